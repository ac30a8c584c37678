"""A training that every stack repeats: the same data, model and steps as this plain loop."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWOptimizer

PYTHON_H = Path(sysconfig.get_path("include"), "Python.h")

INDUCTOR = (
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("c++") is None or not PYTHON_H.exists(),
        reason="torch's compiler needs a C++ compiler and Python's headers",
    ),
)
"""The marks of what runs `torch.compile` with its own backend."""

ALPHA = 0.3
ALL_WORST_OFF = {"alpha": 1.0}
"""In half precision losses nearly tie, and rounding would decide who is in a smaller S."""
BATCH, BATCHES, FEATURES, CLASSES = 8, 4, 5, 3


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))


class Net(nn.Module):
    """The same, for what makes its module by a class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_data(size: int = BATCH * BATCHES) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(size, FEATURES, generator=draw), torch.randint(
        CLASSES, (size,), generator=draw
    )


def make_loader(size: int = BATCH * BATCHES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*make_data(size)), batch_size=BATCH)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_loop(
    epochs: int = 1,
    accumulate: int = 1,
    clip: float | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[list[Tensor], IRWOptimizer]:
    """The parameters after training, and the optimizer."""
    model, criterion = make_model() if model is None else model, nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        sgd(model), **{"alpha": ALPHA, "model": model, "criterion": criterion, **options}
    )
    for _ in range(epochs):
        for number, (x, y) in enumerate(make_loader(), start=1):
            (criterion(model(x), y) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], optimizer


def equal(model: nn.Module, parameters: list[Tensor]) -> bool:
    return all(map(torch.equal, model.parameters(), parameters))


def close(model: nn.Module, parameters: list[Tensor], rtol: float = 1e-5) -> bool:
    return all(
        torch.allclose(p, q, rtol=rtol, atol=rtol * float(q.abs().max()))
        for p, q in zip(model.parameters(), parameters, strict=True)
    )
