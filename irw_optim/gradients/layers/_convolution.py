"""Convolutions, through the operation that autograd itself uses."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers._linear import AffineCall
from irw_optim.gradients.layers._products import inner, operands
from irw_optim.gradients.protocol import wide, widened

CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
"""The settings of ``aten.convolution``, in its order."""

PATCHES = 2**20
"""Numbers that are unfolded at once."""


class ConvolutionCall(AffineCall):
    """Convolutions and transposed ones of any dimension, with `CONVOLUTION` as settings.

    A sample may have several pictures, as a film has: then input and b are (B, pictures, C, ...).
    """

    is_sequence = True

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.weight = weight.detach()
        self.settings = [settings[name] for name in CONVOLUTION]
        self.transposed, self.groups = bool(settings["transposed"]), int(settings["groups"])
        self.features = input.ndim - 1
        # Numbers in what one position reads in one group: a row of the weight.
        self.patch_size = weight.shape[1:].numel()

    def forget_values(self) -> None:
        """Only its shape counts: the products ask for no gradient of the input."""
        self.weight = self.weight.new_empty(()).expand(self.weight.shape)

    @cached_property
    def bias_rows(self) -> Tensor:
        b = self.output_gradient
        others = [d for d in range(1, b.ndim) if d != b.ndim - self.features]
        return b.sum(others, dtype=wide(b.dtype))

    def weight_dot(self, direction: Tensor) -> Tensor:
        a, b = operands(self.input, self.output_gradient)
        settings = direction.to(a.dtype), None, *self.settings
        output: Tensor = torch.ops.aten.convolution(self._pictures(a), *settings)
        return inner(b, output.view(b.shape), in_place=True)

    def weight_gradient(self, a: Tensor, b: Tensor, *, narrow: bool = False) -> Tensor:
        """As autograd computes it, without the gradients of input and bias."""
        weight = self.weight  # only its shape and layout count
        if weight.dtype != b.dtype:
            weight = torch.empty_like(weight, dtype=b.dtype)
        a, b = self._pictures(a), self._pictures(b)
        result = torch.ops.aten.convolution_backward(
            b, a, weight, None, *self.settings, [False, True, False]
        )
        return result[1]  # type: ignore[no-any-return]

    def makes_rows(self, output_shape: torch.Size) -> bool:
        """Where few channels are read: neither the rows nor the patches outnumber a and b."""
        shape = self.recorded.shape if self.transposed else output_shape
        rows = sum(p.numel() for p in self.parameters.values())
        patches = shape[2:].numel() * self.patch_size * self.groups
        numbers = self.input.numel() + output_shape.numel()
        return max(len(self.input) * rows, len(self.recorded) * patches) <= numbers

    def weight_rows(self, samples: slice) -> Tensor:
        first, last, _ = samples.indices(len(self.input))
        side = self.input if self.transposed else self.output_gradient
        numbers = self.patch_size * self.groups * side.shape[1:].numel()
        numbers //= side.shape[-self.features]  # of channels
        step = max(1, PATCHES // max(1, numbers))
        blocks = []
        for start in range(first, max(first + 1, last), step):
            patches, single = self.patches(slice(start, min(start + step, last)))
            blocks.append((single @ patches.mT).flatten(1, 2))
        rows = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        return rows.view(len(rows), *self.weight.shape)

    def patches(self, samples: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The convolution as a linear map: sum over positions of (one side) (patch of the other).

        Returns:
            What each position reads, (b, groups, channels / groups * kernel, positions), and what
            it writes, (b, groups, channels / groups, positions); where transposed in turn.
        """
        stride, padding, dilation, *_ = self.settings
        a, b = widened(self.input[samples]), self.b[samples]
        count, a, b = len(a), self._pictures(a), self._pictures(b)
        many, single = (b, a) if self.transposed else (a, b)
        margins = [side for n in reversed(padding) for side in (n, n)]
        windows = F.pad(many, margins) if any(margins) else many
        kernel, positions = self.weight.shape[2:], single.shape[2:]
        for dim, size in enumerate(kernel, start=2):
            span = (size - 1) * dilation[dim - 2] + 1
            windows = windows.unfold(dim, span, stride[dim - 2])[..., :: dilation[dim - 2]]
            windows = windows.narrow(dim, 0, positions[dim - 2])
        first, last = range(2, 2 + len(kernel)), range(2 + len(kernel), windows.ndim)
        windows = windows.permute(0, 1, *last, *first)
        each, size = len(single) // max(1, count), positions.numel()

        def positions_last(side: Tensor, numbers: int) -> Tensor:
            side = side.reshape(count, each, self.groups, numbers, size)
            return side[:, 0] if each == 1 else side.permute(0, 2, 3, 1, 4).flatten(3)

        width = single.shape[1] // self.groups
        return positions_last(windows, self.patch_size), positions_last(single, width)

    def _pictures(self, side: Tensor) -> Tensor:
        """One after the other, whoever's they are."""
        return side.flatten(0, 1) if side.ndim > self.features + 1 else side
