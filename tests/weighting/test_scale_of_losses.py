"""Weights are free of the scale of the losses, also where float32 cannot hold a score.

Scores are quadratic in the gradients: losses times 1e-24 have gradients that float32 holds, and
scores of 1e-48, which it does not. The reference is the float64 loop on the losses as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import models
import opacus
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim import DBSCANFilter, IRWOptimizer, PerSampleLoss, irw_weights
from irw_optim.gradients import MaterializedGradients
from irw_optim.schemes import global_weights
from irw_optim.weighting.outliers import distances
from irw_optim.weighting.weights import Alignment, weigh

SCALES = [1e-30, 1e-24, 1e-18, 1e-12, 1e15, 1e20]
ALPHA, B = 0.3, 16
at_every_scale = pytest.mark.parametrize("scale", SCALES)


def mlp() -> nn.Module:
    return models.mlp(5, 16, 3)


def wide() -> nn.Module:  # too wide for the products of pairs of samples
    return nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 300), nn.Linear(300, 3))


def tied() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer)


def convolution() -> nn.Module:
    front = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.Flatten())
    return nn.Sequential(front, nn.LayerNorm(12), nn.Linear(12, 3))


MODELS = {"mlp": mlp, "wide": wide, "tied": tied, "convolution": convolution}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 5, generator=generator)
    return x, torch.randint(0, 3, (B,), generator=generator)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def expected(model: nn.Module, **options: Any) -> tuple[reference.Decision, list[Tensor]]:
    """The decision in float64, and the gradient that it makes."""
    x, y = batch()
    model = deepcopy(model).double()
    losses = losses_of(model, x.double(), y)
    G = reference.per_sample_gradients(losses, model.parameters())
    decision = reference.decide(losses.detach(), G, ALPHA, **options)
    flat = decision.weights @ G
    sizes = [p.numel() for p in model.parameters()]
    return decision, list(flat.split(sizes))


def check(model: nn.Module, optimizer: IRWOptimizer, scale: float, **options: Any) -> None:
    decision, gradients = expected(model, **options)
    record = optimizer.last_step
    assert record is not None
    assert not record.fallback
    assert record.broken_samples == []
    torch.testing.assert_close(record.weights.double(), decision.weights, rtol=1e-3, atol=1e-5)
    largest = max(float(g.abs().max()) for g in gradients)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        found = p.grad.double().flatten() / scale
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5 * largest)
    optimizer.step()


@at_every_scale
@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_free_of_the_scale(name: str, engine: str, scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](), batch()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), alpha=ALPHA, model=model, engine=engine
    )
    optimizer.backward(losses_of(model, x, y) * scale)
    scores = optimizer.last_step.scores.double() / scale / scale
    torch.testing.assert_close(scores, expected(model)[0].scores, rtol=1e-3, atol=1e-5)
    check(model, optimizer, scale)


@at_every_scale
def test_a_factor_on_the_scalar_leaves_the_weights_alone(scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    criterion = nn.CrossEntropyLoss()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model, criterion=criterion)
    (criterion(model(x), y) * scale).backward()
    check(model, optimizer, scale)


@at_every_scale
@pytest.mark.parametrize(
    "options", [{"center": 1.0}, {"mix": 0.25}, {"class_balance": True}], ids=str
)
def test_with_options(options: dict[str, Any], scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model, **options)
    optimizer.backward(losses_of(model, x, y) * scale, labels=y)
    if "class_balance" in options:
        options = {"labels": y.tolist()}
    check(model, optimizer, scale, **options)


@at_every_scale
def test_passes_that_are_weighed_together(scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model, accumulation_steps=2)
    for some in (slice(0, 6), slice(6, B)):
        optimizer.backward(losses_of(model, x[some], y[some]) * scale)
    check(model, optimizer, scale * 2)


@at_every_scale
def test_rows_that_opacus_made(scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    rows = opacus.GradSampleModule(deepcopy(model), loss_reduction="sum")
    optimizer = IRWOptimizer(torch.optim.SGD(rows.parameters(), lr=0.0), alpha=ALPHA)
    losses = losses_of(rows, x, y) * scale
    losses.sum().backward()
    optimizer.step(losses=losses)
    for p, q in zip(model.parameters(), rows.parameters(), strict=True):
        p.grad = q.grad
    optimizer.zero_grad()
    decision, gradients = expected(model)
    torch.testing.assert_close(
        optimizer.last_step.weights.double(), decision.weights, rtol=1e-3, atol=1e-5
    )
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(
            p.grad.double().flatten() / scale, gradient, rtol=1e-3, atol=1e-4
        )


def far_ones_leave(gram: Tensor) -> Tensor:
    D = distances(gram)
    return D.mean(1) > 1.2 * D.mean()


FILTERS: dict[str, Callable[[float], Any]] = {
    "automatic": lambda scale: DBSCANFilter(min_samples=3, quantile=0.8),
    "a radius": lambda scale: DBSCANFilter(eps=2.3 * scale, min_samples=3),
    "a function": lambda scale: far_ones_leave,
}


@at_every_scale
@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("name", FILTERS)
def test_outliers_are_the_same(name: str, engine: str, scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    x[0] *= 4
    double = deepcopy(model).double()
    G = reference.per_sample_gradients(losses_of(double, x.double(), y), double.parameters())
    removed = FILTERS[name](1.0)(G @ G.T).nonzero().flatten().tolist()
    assert 0 < len(removed) < B
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        alpha=ALPHA,
        model=model,
        outliers=FILTERS[name](scale),
        engine=engine,
    )
    losses = losses_of(model, x, y)
    optimizer.backward(losses * scale)
    record = optimizer.last_step
    assert record.outliers.nonzero().flatten().tolist() == removed
    decision = reference.decide(losses.detach(), G, ALPHA, removed=removed)
    torch.testing.assert_close(record.weights.double(), decision.weights, rtol=1e-3, atol=1e-5)


@at_every_scale
@pytest.mark.parametrize("outliers", [None, DBSCANFilter(min_samples=3, quantile=0.8)])
def test_weights_of_a_matrix(outliers: Any, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    losses, G = torch.rand(B, generator=generator), torch.randn(B, 40, generator=generator) + 0.3
    plain = irw_weights(losses.double(), G.double(), ALPHA, outliers=outliers)
    scaled = irw_weights(losses * scale, G * scale, ALPHA, outliers=outliers)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.double(), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_weights_of_a_matrix_in_float64(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    losses, G = torch.rand(B, generator=generator).double(), torch.rand(B, 40).double() - 0.3
    weights = irw_weights(losses * scale, G * scale, ALPHA)
    torch.testing.assert_close(weights, irw_weights(losses, G, ALPHA))


@pytest.mark.parametrize("outliers", [None, DBSCANFilter(min_samples=3, quantile=0.8)])
def test_engines_that_know_nothing_of_it(outliers: Any) -> None:
    class Bare:
        """The three products of the protocol, and no more."""

        def __init__(self, matrix: Tensor) -> None:
            self.rows_ = MaterializedGradients.of(matrix)
            self.batch_size = len(matrix)
            self.combine, self.dot = self.rows_.combine, self.rows_.dot
            self.gram = self.rows_.gram

    generator = torch.Generator().manual_seed(1)
    losses, G = torch.rand(B, generator=generator), torch.randn(B, 40, generator=generator) + 0.3
    plain = weigh(losses, Bare(G), ALPHA, Alignment(), outliers=outliers)
    scaled = weigh(losses, Bare(G * 1e-24), ALPHA, Alignment(), outliers=outliers)
    assert torch.equal(scaled.outliers, plain.outliers)
    torch.testing.assert_close(scaled.weights, plain.weights, rtol=1e-4, atol=1e-6)


@at_every_scale
def test_weights_of_a_data_set(scale: float) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), batch()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    criterion = PerSampleLoss(lambda out, y: F.cross_entropy(out, y, reduction="none") * scale)
    weights = global_weights(model, criterion, loader, alpha=ALPHA)
    torch.testing.assert_close(weights.double(), expected(model)[0].weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_really_not_finite_is_still_named(scale: float, value: float) -> None:
    model, (x, y) = mlp(), batch()
    x[3] = value
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model)
    optimizer.backward(losses_of(model, x, y) * scale)
    with pytest.raises(FloatingPointError, match=r"1 samples.*indices 3"):
        optimizer.step()


def test_gradients_of_zero_fall_back_to_uniform_weights() -> None:
    weights = irw_weights(torch.rand(4), torch.zeros(4, 3), ALPHA)
    assert torch.equal(weights, torch.full((4,), 0.25))


def test_the_ordinary_range_takes_one_product() -> None:
    class Counting(MaterializedGradients):
        products = 0

        def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
            type(self).products += 1
            return super().combine(weights)

    G = torch.randn(B, 7)
    rows = Counting({torch.zeros(7): G})
    scores = weigh(torch.rand(B), rows, ALPHA, Alignment()).scores
    assert rows.products == 1
    assert scores.dtype == torch.float32
