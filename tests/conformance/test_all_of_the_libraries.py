"""No optimizer is left out: all of torch.optim, schedule-free and pytorch_optimizer take a step.

`test_every_inner_optimizer` puts a choice of them through every row; here each one, whatever the
installed version has, steps on the weighted gradient bit for bit as it would by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from inner_optimizers import (
    SCHEDULE_FREE,
    TORCH,
    CheckedRun,
    Inner,
    Parameters,
    PlainRun,
    pytorch_optimizer,
    same,
    schedulefree,
)
from torch import Tensor, nn, optim


def test_no_optimizer_of_torch_is_missing() -> None:
    kinds = {
        kind
        for kind in vars(optim).values()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
    }
    tried = {type(inner.inner(inner.model())) for inner in TORCH}
    assert kinds - {optim.Optimizer} == tried


class Given(nn.Module):
    """Just enough of a model for optimizers that ask for one."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self.layers = nn.ParameterList(parameters)


def of(name: str) -> Callable[..., Any]:
    return pytorch_optimizer.load_optimizer(name)


def muon(name: str) -> Callable[[Parameters], Any]:
    return lambda p: of(name)([{"params": list(p), "use_muon": True}], lr=1e-2)


ASK_FOR_MORE: dict[str, Any] = {
    "adago": {"make": muon("adago"), "matrices_only": True},
    "adammini": {"make": lambda p: of("adammini")(Given(p))},
    "adamuon": {"make": muon("adamuon"), "matrices_only": True},
    "alig": {"closure": "tells the loss"},
    "bsam": {"make": lambda p: of("bsam")(p, num_data=10), "closure": "evaluates again"},
    "lbfgs": {"closure": "evaluates"},
    "muon": {"make": muon("muon"), "matrices_only": True},
    "muonclip": {"make": muon("muonclip"), "matrices_only": True},
    "normuon": {"make": muon("normuon"), "matrices_only": True},
    "ranger21": {"make": lambda p: of("ranger21")(p, num_iterations=10)},
    "sara": {"make": lambda p: of("sara")(p, lr=1e-2, threshold=1.0)},  # moves what is small
    "spectralsphere": {"matrices_only": True},
}

REFUSED = {
    "adahessian": "asks for second derivatives, which backward(create_graph=True) refuses by name",
    "sophiah": "asks for second derivatives, which backward(create_graph=True) refuses by name",
    "adalomo": "has a backward pass of its own",
    "lomo": "has a backward pass of its own",
    "demo": "asks for a process group",
    "distributedmuon": "asks for a process group",
    "fadam": "does not take float64",
}


def everything() -> list[Inner]:
    if pytorch_optimizer is None:
        return []
    names = [n for n in pytorch_optimizer.get_supported_optimizers() if n not in REFUSED]
    known = {inner.name for inner in SCHEDULE_FREE}
    others = {
        f"{name} of schedulefree": kind
        for name, kind in vars(schedulefree).items()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and name not in known
    }
    wrappers = {"TRAC": {}, "OrthoGrad": {}, "ScheduleFreeWrapper": {}}
    sharp = {"LookSAM": {}, "FriendlySAM": {}}
    return [
        *(Inner(n, **{"make": _plain(of(n)), **ASK_FOR_MORE.get(n, {})}) for n in names),
        *(
            Inner(n, _plain(kind, lr=1e-2), closure="evaluates" if "Closure" in n else "")
            for n, kind in others.items()
        ),
        *(Inner(n, _around(getattr(pytorch_optimizer, n))) for n in wrappers),
        *(Inner(n, _sharp(getattr(pytorch_optimizer, n)), "evaluates") for n in sharp),
    ]


def _plain(kind: Callable[..., Any], **options: Any) -> Callable[[Parameters], Any]:
    return lambda p: kind(p, **options)


def _around(kind: Callable[..., Any]) -> Callable[[Parameters], Any]:
    return lambda p: kind(optim.SGD(p, lr=0.1))


def _sharp(kind: Callable[..., Any]) -> Callable[[Parameters], Any]:
    return lambda p: kind(list(p), optim.SGD, lr=0.1)


@pytest.mark.parametrize("inner", everything(), ids=str)
def test_it_steps_on_the_weighted_gradient(inner: Inner) -> None:
    def courses(run: Any) -> list[list[Tensor]]:
        torch.manual_seed(3)  # some draw random numbers
        random.seed(3)
        np.random.seed(3)
        points = []
        for x, y in inner.batches(12, size=4):  # some only begin to move after ten steps
            run.step(x, y)
            points.append([p.detach().clone() for p in run.parameters])
        return points

    run = CheckedRun(inner)
    ours, theirs = courses(run), courses(PlainRun(run))
    assert run.error < 1e-9, "against a loop over the samples"
    assert run.optimizer.steps == len(ours)
    assert same(ours, theirs)
    assert not all(same(point, ours[0]) for point in ours)


@pytest.mark.skipif(pytorch_optimizer is None, reason="pytorch_optimizer is not installed")
def test_what_is_left_out_is_there() -> None:
    assert REFUSED.keys() | ASK_FOR_MORE.keys() <= set(pytorch_optimizer.get_supported_optimizers())
