"""Small networks for the loops: a trunk with two heads, and other networks around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import fuzz_blocks as blocks
import torch
from fuzz_trials import Draw
from torch import Tensor, nn

WIDTH, CLASSES = 4, 3


class Mapped(nn.Module):
    """A function between the blocks."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(linear(), nn.Tanh()),
    "deep": lambda: nn.Sequential(linear(), nn.Tanh(), linear(), nn.Softplus()),
    "in place": lambda: nn.Sequential(linear(), nn.LeakyReLU(0.3, inplace=True)),
    "layer norm": lambda: nn.Sequential(linear(), nn.LayerNorm(WIDTH), nn.Tanh()),
    "batch norm": lambda: nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.Tanh()),
    "dropout": lambda: nn.Sequential(linear(), nn.Dropout(0.3), nn.Tanh()),
    "centred": lambda: blocks.Centred(linear),
    "parameter": lambda: nn.Sequential(linear(), blocks.Direct("multiply", WIDTH)),
    "twice": lambda: blocks.Twice(linear),
    "checkpointed": lambda: nn.Sequential(blocks.Checkpointed(linear), nn.Tanh()),
    "LoRA": lambda: nn.Sequential(blocks.LoRA(WIDTH), nn.Tanh()),
    "experts": lambda: nn.Sequential(blocks.Experts(WIDTH), nn.Tanh()),
    "recurrent": lambda: Recurrent(),
}
STEADY = ("linear", "deep", "in place", "layer norm", "parameter", "twice")
"""Those in which a sample's output is its own, and the same every time."""


class Recurrent(nn.Module):
    """One vector as a sequence of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(1, WIDTH, batch_first=True)

    def forward(self, x):
        return self.cell(x[..., None])[0][:, -1]


class Net(nn.Module):
    """A trunk with two heads; called, the first head's output."""

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.trunk = TRUNKS[trunk]()
        self.a, self.b = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.a(self.trunk(x))


class Alone(nn.Module):
    """A world of one model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def alone(make: Callable[[], nn.Module]) -> nn.Module:
    return Alone(make())


class World(nn.Module):
    """The wrapped model, and networks that are none of its business."""

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.model = Net(trunk)
        self.before = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.after = nn.Linear(CLASSES, CLASSES)
        self.teacher = nn.Linear(WIDTH, CLASSES)


class Batch(NamedTuple):
    """Inputs and two targets of B samples, and further batches."""

    x: Tensor
    y: Tensor
    z: Tensor
    more: tuple[Batch, ...] = ()


def make_batch(size: int, dtype: torch.dtype = torch.float64) -> Batch:
    x = torch.randn(size, WIDTH, dtype=dtype)
    return Batch(x, torch.randint(CLASSES, (size,)), torch.randint(CLASSES, (size,)))


def batches(draw: Draw, smallest: int = 2, further: int = 2) -> Callable[[int], Batch]:
    """Batches of a few sizes, by the number of the step."""
    sizes = [[draw.randint(smallest, 7) for _ in range(1 + further)] for _ in range(8)]

    def batch(number: int) -> Batch:
        first, *rest = (make_batch(size) for size in sizes[number % 8])
        return first._replace(more=tuple(rest))

    return batch
