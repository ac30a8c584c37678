"""Saving, going on, and what a checkpoint of another kind says."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from inner_optimizers import ADAM, ALPHA, SGD, Inner, Run, same
from torch import Tensor, nn
from torch.optim import lr_scheduler

from irw_optim import DBSCANFilter, IRWOptimizer


class Training:
    """Dropout, momentum, a scheduler, a warm-up, shuffled batches: all that a resume must keep."""

    def __init__(self, inner: Inner, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.4), nn.BatchNorm1d(16), nn.Linear(16, 3)
        )
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = IRWOptimizer(
            inner.inner(self.model),
            alpha=ALPHA,
            model=self.model,
            criterion=self.criterion,
            **options,
        )
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=40)
        draw = torch.Generator().manual_seed(2)
        self.data = torch.randn(48, 5, generator=draw), torch.randint(3, (48,), generator=draw)

    def train(self, steps: int) -> list[Tensor]:
        weights = []
        for _ in range(steps):
            batch = torch.randperm(48)[:12]
            self.optimizer.zero_grad()
            self.criterion(self.model(self.data[0][batch]), self.data[1][batch]).backward()
            self.optimizer.step()
            self.scheduler.step()
            weights.append(self.optimizer.last_step.weights)
        return weights

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = [self.model, self.optimizer, self.scheduler]
        torch.save([*(part.state_dict() for part in parts), torch.get_rng_state()], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        model, optimizer, scheduler, random = torch.load(file, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)
        torch.set_rng_state(random)


@pytest.mark.parametrize("at", [2, 7], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"outliers": DBSCANFilter(), "center": 1.0, "mix": 0.5},
        {"class_balance": True, "score_parameters": "last"},
        {"weighting": "cvar"},
    ],
    ids=str,
)
@pytest.mark.parametrize("inner", [SGD, ADAM], ids=str)
def test_a_resumed_training_is_the_uninterrupted_one(
    inner: Inner, options: dict[str, Any], at: int
) -> None:
    first = Training(inner, warmup_steps=4, **options)
    first.train(at)
    file = first.save()
    expected = first.train(6)

    second = Training(inner, warmup_steps=4, **options)
    second.load(file)
    found = second.train(6)
    assert all(map(torch.equal, found, expected))
    assert same(second.model.state_dict(), first.model.state_dict())
    assert same(second.optimizer.state_dict(), first.optimizer.state_dict())
    assert not all(torch.equal(w, torch.full_like(w, 1 / 12)) for w in found)


def test_the_state_is_the_inner_optimizers_and_a_key_of_ours() -> None:
    optimizer = Run(SGD, warmup_steps=2).train(SGD.batches()).optimizer
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups", "irw"}
    assert state["irw"] == {
        "steps": 4,
        "alpha": ALPHA,
        "outliers": None,
        "center": 0.0,
        "class_balance": False,
        "mix": 0.0,
        "warmup_steps": 2,
        "score_parameters": None,
        "weighting": "irw",
        "accumulation_steps": 1,
        "worst_off": "global",
    }


def my_scores(losses: Tensor, gradients: Any, worst_off: Tensor) -> Tensor:
    return losses


def test_options_that_differ_are_named_and_stay_as_they_are_now(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = Run(SGD, alpha=0.2, outliers=DBSCANFilter(eps=2.0)).optimizer
    now = Run(SGD, alpha=0.3, weighting=my_scores).optimizer
    with caplog.at_level(logging.WARNING, "irw_optim"):
        now.load_state_dict(before.state_dict())
    said = "\n".join(caplog.messages)
    assert "alpha=0.2; training goes on with 0.3" in said
    assert "weighting='irw'; training goes on with 'my_scores'" in said
    assert "eps=2.0" in said
    assert len(caplog.messages) == 3
    assert now.scheme.alpha == 0.3


def test_the_same_options_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    options = {"weighting": my_scores, "outliers": DBSCANFilter(eps=2.0)}
    options["score_parameters"] = lambda name, parameter: True
    Run(SGD, **options).optimizer.load_state_dict(Run(SGD, **options).optimizer.state_dict())
    assert not caplog.messages


def test_a_plain_checkpoint_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(SGD, warmup_steps=9).train(SGD.batches())
    run.optimizer.load_state_dict(SGD.inner(SGD.model()).state_dict())
    assert run.optimizer.steps == 4
    (said,) = caplog.messages
    assert "a plain optimizer's" in said
    assert "steps" in said
    assert "warmup_steps" in said


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    run = Run(SGD).train(SGD.batches())
    state = run.optimizer.state_dict()
    other = IRWOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), alpha=0.3)
    with pytest.raises(ValueError, match="doesn't match the size"):
        run.optimizer.load_state_dict(other.state_dict())
    assert run.optimizer.steps == 4
    assert same(run.optimizer.state_dict(), state)


def test_the_distributed_checkpoint_functions_of_torch() -> None:
    """They step once with gradients of zero to make the state, and put it under names."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    first = Run(ADAM).train(ADAM.batches(2))
    state = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    assert "0.weight" in state["state"]
    second = Run(ADAM)
    second.model.load_state_dict(first.model.state_dict())
    set_optimizer_state_dict(second.model, second.optimizer, state)
    first.train(ADAM.batches(4)[2:])
    second.train(ADAM.batches(4)[2:])
    assert all(map(torch.equal, first.parameters, second.parameters))
