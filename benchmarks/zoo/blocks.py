"""Pieces that models of several fields are made of."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Make = Callable[..., nn.Module]
RELU = partial(nn.ReLU, inplace=True)


class Apply(nn.Module):
    """A function without parameters, as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Skip(nn.Sequential):
    """Layers beside a skip: x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Joined(nn.ModuleList):
    """What several modules make of the same input, side by side as channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], 1)


class Scale(nn.Module):
    """Learned factors of the last dimension."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def swapped() -> Apply:
    """The last two of three dimensions change places."""
    return Apply(lambda x: x.transpose(1, 2))


def mean(dimension: int = 1) -> Apply:
    return Apply(lambda x: x.mean(dimension))


def widening(width: int, ratio: int = 4) -> nn.Sequential:
    """The MLP of a transformer."""
    layers = nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width)
    return nn.Sequential(*layers)


# Pictures --------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size but for its stride, without bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def normed(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: Make | None = None,
    norm: Make = nn.BatchNorm2d,
) -> list[nn.Module]:
    """`conv`, a normalisation, and an activation."""
    layers = [conv(inputs, outputs, kernel, stride, groups), norm(outputs)]
    return [*layers, act()] if act else layers


def head(width: int, classes: int = 10) -> nn.Sequential:
    """A mean over the pixels, and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class SqueezeExcite(nn.Module):
    """Gates of the channels from their means."""

    def __init__(self, width: int, least: int = 1, gate: Callable = torch.sigmoid) -> None:
        super().__init__()
        hidden, self.gate = max(least, width // 4), gate
        self.narrow, self.widen = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.widen(F.relu(self.narrow(x.mean((2, 3), keepdim=True)))))
