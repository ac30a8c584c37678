"""Every scheduler of torch, on the wrapper and on the optimizer inside: the plain one's rates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from inner_optimizers import SGD, Run
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

STEPS = 8

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, cooldown=1),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.02, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
}


def test_no_scheduler_of_torch_is_missing() -> None:
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} <= SCHEDULERS.keys()


def advance(scheduler: Any, optimizer: Any) -> tuple[float, float]:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()
    (group,) = optimizer.param_groups
    return group["lr"], group["momentum"]


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_are_the_plain_optimizers(name: str, on: str) -> None:
    plain = SGD.inner(SGD.model())
    theirs = SCHEDULERS[name](plain)
    run = Run(SGD)
    ours = SCHEDULERS[name](run.optimizer if on == "wrapper" else run.optimizer.inner)
    before = [p.detach().clone() for p in run.parameters]
    rates = []
    for x, y in SGD.batches(STEPS):
        plain.step()
        run.step(x, y)  # warnings are errors: the scheduler must see that a step was taken
        rates.append(advance(ours, run.optimizer.inner))
        assert rates[-1] == advance(theirs, plain)
    assert len(set(rates)) > 1
    assert any((p != q).any() for p, q in zip(run.parameters, before, strict=True))


@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_a_scheduler_that_steps_first_is_told_so(on: str) -> None:
    optimizer = Run(SGD).optimizer
    scheduler = lr_scheduler.StepLR(optimizer if on == "wrapper" else optimizer.inner, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_skipped_step_is_no_step_for_a_scheduler_on_the_wrapper() -> None:
    optimizer = Run(SGD).optimizer
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step()
    assert not optimizer.__dict__.get("_opt_called", False)
