"""Opacus' per-sample gradients as they are: GradSampleModule, and hooks without a wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from common import ALPHA, make_loader, make_model, plain_loop, sgd
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.nn.functional import cross_entropy

from irw_optim import DBSCANFilter, IRWOptimizer


def with_a_module(model: nn.Module) -> Any:
    return GradSampleModule(model)


def with_hooks(model: nn.Module) -> Any:
    GradSampleHooks(model)
    return model


both = pytest.mark.parametrize("wrap", [with_a_module, with_hooks], ids=lambda w: w.__name__)


@both
@pytest.mark.parametrize("outliers", [None, DBSCANFilter(quantile=0.8)], ids=["IRW", "IRWO"])
def test_the_losses_go_to_step(wrap: Any, outliers: Any) -> None:
    model = wrap(make_model())
    optimizer = IRWOptimizer(sgd(model), alpha=ALPHA, outliers=outliers)
    for x, y in make_loader():
        optimizer.zero_grad()
        losses = cross_entropy(model(x), y, reduction="none")
        losses.mean().backward()
        optimizer.step(losses=losses)
    expected, plain = plain_loop(outliers=outliers)
    for p, q in zip(model.parameters(), expected, strict=True):
        assert reference.error(p.detach(), q) < 1e-5
    assert optimizer.steps == plain.steps


@both
def test_the_gradient_against_a_loop_over_the_samples(wrap: Any) -> None:
    twin = make_model().double()
    model = wrap(make_model().double())
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), alpha=ALPHA)
    x, y = next(iter(make_loader()))
    losses = cross_entropy(model(x.double()), y, reduction="none")
    losses.mean().backward()
    optimizer.step(losses=losses)
    losses = cross_entropy(twin(x.double()), y, reduction="none")
    oracle = reference.step(losses, twin.parameters(), ALPHA)
    for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
        assert reference.error(p.grad, gradient) < 1e-9


@both
def test_what_is_wrong_is_named(wrap: Any) -> None:
    model = wrap(make_model())
    optimizer = IRWOptimizer(sgd(model), alpha=ALPHA)
    x, y = next(iter(make_loader()))
    losses = cross_entropy(model(x), y, reduction="none")
    losses.mean().backward()
    with pytest.raises(ValueError, match=r"losses has 3 samples but p.grad_sample has 8"):
        optimizer.step(losses=losses[:3])
    with pytest.raises(RuntimeError, match=r"a gradient without weights.*step\(losses=losses\)"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad_sample is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="no parameter has a grad_sample"):
        optimizer.step(losses=losses)
