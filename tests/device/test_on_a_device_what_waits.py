"""How often a step waits for the device: looking at a number empties its queue."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from irw_optim import DBSCANFilter, IRWOptimizer

B, CLASSES = 16, 3
HOST = torch.device("cpu")
LOOKS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "bincount"}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function._schema.name.split("::")[1]
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        there = any(t.device != HOST for t in tensors)
        out = function(*args, **(kwargs or {}))
        masks = any(t.ndim and t.dtype == torch.bool for t in tensors[1:])
        back = isinstance(out, Tensor) and out.device == HOST and "copy" in name
        if there and (name in LOOKS or back or (name.startswith("index") and masks)):
            self.met.append(name)
        return out


def mlp() -> nn.Module:
    return models.mlp(10, 8, CLASSES, act=nn.ReLU)


def with_batch_norm() -> nn.Module:
    return models.mlp(10, 8, CLASSES, norm=nn.BatchNorm1d, act=nn.ReLU)


class OfNodes(nn.Module):
    """Two nodes a sample, in an order that tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.answer = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(2 * B)
        h = self.read(x.view(2 * B, 5).index_select(0, order)).relu()
        return self.answer(h.new_zeros(B, 8).index_add(0, order // 2, h))


def waits(make: Any, steps: int, *, ignored: bool = False, **options: Any) -> list[int]:
    """How often each step waits."""
    torch.manual_seed(0)
    model, criterion = make(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = IRWOptimizer(sgd, alpha=0.2, model=model, criterion=criterion, **options)
    x, y = torch.randn(B, 10), torch.randint(0, CLASSES, (B,))
    if ignored:
        y[3] = -100
    found = []
    for _ in range(steps):
        with Waits() as watch:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        found.append(len(watch.met))
    return found


@pytest.mark.parametrize("make", [mlp, with_batch_norm, OfNodes])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": 1.0},
        {"mix": 0.1},
        {"class_balance": True},
        {"weighting": "cvar"},
        {"weighting": "uniform"},
        {"score_parameters": "last"},
        {"ignored": True},
    ],
    ids=str,
)
def test_a_step_waits_once(make, options):
    assert max(waits(make, 20, **options)[16:]) <= 1


@pytest.mark.parametrize("make", [mlp, with_batch_norm])
def test_with_outliers_it_waits_twice(make):
    assert max(waits(make, 20, outliers=DBSCANFilter())[16:]) <= 2


@pytest.mark.parametrize("make", [mlp, with_batch_norm])
def test_a_comparison_with_autograd_waits_twice_more(make):
    assert max(waits(make, 32)[1:]) <= 3


def test_what_is_counted_can_be_seen():
    with Waits() as watch:
        float(torch.ones(()))
        torch.ones(3).cpu()
    assert len(watch.met) == 2
