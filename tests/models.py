"""The small models that tests train; one that nobody else has is made where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Layer = Callable[[], nn.Module]


def mlp(
    *widths: int, act: Layer | None = nn.Tanh, norm: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    """Linear layers from width to width, and between them a norm, if there is one, and ``act``."""
    *hidden, last = [nn.Linear(*pair) for pair in pairwise(widths)]
    layers: list[nn.Module] = []
    for layer in hidden:
        layers.append(layer)
        layers += [] if norm is None else [norm(layer.out_features)]
        layers += [] if act is None else [act()]
    return nn.Sequential(*layers, last)


class Recurrent(nn.Module):
    """A class for every sequence (B, T, d), from the last output of a layer."""

    def __init__(self, layer: nn.RNNBase, classes: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class OnceDifferentiable(torch.autograd.Function):
    """An operation without double backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()
