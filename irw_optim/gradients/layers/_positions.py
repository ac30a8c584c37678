"""Layers that use a weight at many positions: over space, convolutions and gains; LSTMs over time.

A fused LSTM shows the gradient of its states alone; its `recurrence` makes of it that of the gates,
which are a linear map of the inputs and another of the states.
"""

import math
from collections.abc import Mapping
from copy import copy
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from irw_optim.gradients.protocol import Direction, added, wide, widened
from irw_optim.gradients.recurrence import linearized, steps_of

from ._call import FIRST, LayerCall, Layout, RowWeights
from ._linear import AffineCall, LinearCall
from ._products import inner, operands, summed, summed_rows
from ._rows import SampleNormCall

CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
"""Settings in the order of ``aten.convolution``."""

PATCHES = 2**20  # numbers that are unfolded at once


class ConvolutionCall(AffineCall):
    """Convolutions of any dimension, transposed or not, with `CONVOLUTION` as settings.

    A sample may have several pictures: then input and b are (B, pictures, C, ...).
    """

    is_sequence = True

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.weight = weight.detach()
        self.settings = [settings[name] for name in CONVOLUTION]
        self.transposed, self.groups = bool(settings["transposed"]), int(settings["groups"])
        self.features = input.ndim - 1
        self.patch_size = weight.shape[1:].numel()  # in one group

    def forget_values(self) -> None:
        """Only its shape counts."""
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
        weight = self.weight
        if weight.dtype != b.dtype:
            weight = torch.empty_like(weight, dtype=b.dtype)
        a, b = self._pictures(a), self._pictures(b)
        result = torch.ops.aten.convolution_backward(
            b, a, weight, None, *self.settings, [False, True, False]
        )
        return result[1]  # type: ignore[no-any-return]

    def numbers_in_rows(self, output_shape: torch.Size) -> int:
        shape = self.recorded.shape if self.transposed else output_shape
        positions = len(self.recorded) * shape[-self.features + 1 :].numel()
        return max(positions * self.patch_size * self.groups, super().numbers_in_rows(output_shape))

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
        """What each position reads, and what it writes; where transposed, in turn.

        (b, groups, channels / groups * kernel, positions) and (b, groups, channels / groups,
        positions).
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
        return side.flatten(0, 1) if side.ndim > self.features + 1 else side


class ChannelNormCall(SampleNormCall):
    """With a gain for each channel; mean and scale of groups of channels, (N, groups)."""

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        """Autograd sums over samples: here over the one that has everybody's channels."""
        given = self.input, self.mean, self.scale, self.output_gradient
        a, mean, scale, b = (widened(t[samples]) for t in given)
        *leading, channels = b.shape[: 1 - self.features or None]
        count = math.prod(leading) * channels
        if not count:
            return {p: b.new_zeros(0, channels) for p in self.parameters.values()}
        one = 1, count, b.numel() // count
        sides = b.reshape(one), a.reshape(one), mean.reshape(1, -1), scale.reshape(1, -1)
        # The gain is read for the gradient of the input alone, which nobody asks for.
        settings = a.new_empty(count), *one, mean.numel(), [False, True, True]
        _, *sums = torch.ops.aten.native_group_norm_backward(*sides, *settings)
        if len(leading) > 1:
            sums = [t.view(len(b), -1, channels).sum(1) for t in sums]
        by_role = {"weight": sums[0].view(-1, channels), "bias": sums[1].view(-1, channels)}
        return {p: by_role[role] for role, p in self.parameters.items()}


LSTM = 2  # torch's number of the cell


class LSTMCall(LayerCall):
    """One direction of one layer, which read (T, B, d) and computed the states, (T, B, H).

    Output 0 is all states, 1 the last state, 2 the last cell. Values have names of `RECURRENT`.
    """

    def __init__(
        self,
        input: Tensor,
        states: Tensor,
        first_state: Tensor,
        first_cell: Tensor,
        values: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        *,
        output: int,
        reverse: bool,
        hands_back: GradientEdge | None = None,
    ) -> None:
        super().__init__(input, **parameters)
        self.states, self.first_state, self.first_cell = states, first_state, first_cell
        self.values = {name: value.detach() for name, value in values.items()}
        self.output, self.reverse, self.hands_back = output, reverse, hands_back
        self.parts: list[LayerCall] = []

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        """Behind the time; or several rows a sample."""
        rows, dim = self.recorded.shape[1], int(self.output == 0)
        if rows == batch_size:
            return (Layout(dim) if dim else FIRST,)
        folds = ("batch major", "batch minor") if batch_size and rows % batch_size == 0 else ()
        return tuple(Layout(dim, fold) for fold in folds)

    def settle(self, layout: Layout | None, batch_size: int) -> None:
        self.layout, self.batch_size = layout, batch_size

    def set_output_gradient(self, gradient: Tensor) -> None:
        super().set_output_gradient(gradient)
        assert self.layout is not None
        (length, batch), inputs = self.recorded.shape[:2], widened(self.recorded)
        steps = steps_of((batch,) * length, self.reverse)
        rows, states = inputs.flatten(0, 1), self.states.flatten(0, 1)
        first = self.first_state, self.first_cell
        recurrence = linearized("LSTM", rows, states, steps, *first, self.values)
        arriving: list[Any] = [None] * 3
        arriving[self.output] = gradient.flatten(0, -2)
        b, *_ = recurrence.back(steps, widened(self.values["weight_hh"]), *arriving)
        self.of_gates = b = b.view(length, batch, -1)
        before = recurrence.before.view(length, batch, -1)
        parts = []
        for side, sequence in (("ih", inputs), ("hh", before)):
            weight, bias = map(self.parameters.get, (f"weight_{side}", f"bias_{side}"))
            part = LinearCall(sequence, weight, bias)
            part.settle(self.layout._replace(dim=1), self.batch_size)
            part.set_output_gradient(b)
            parts += [part] if part.parameters else []
            if bias is not None:
                part.bias_rows = parts[0].bias_rows  # of one b
        self.parts = [*parts]

    def input_gradient(self) -> Tensor:
        return (self.of_gates @ widened(self.values["weight_ih"])).type_as(self.recorded)

    def let_go(self) -> None:
        super().let_go()
        self.states = self.first_state = self.first_cell = self.of_gates = self.recorded
        self.parts = []

    def arrangement(self) -> tuple[object, ...]:
        return *super().arrangement(), self.output

    def without(self, dropped: Tensor) -> LayerCall:
        part = copy(self)
        part.parts = [some.without(dropped) for some in self.parts]
        return part

    def dot(self, direction: Direction) -> Tensor:
        return added(part.dot(direction) for part in self._of_chosen())

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return summed(part.combine(weights) for part in self._of_chosen())

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        return summed_rows(self._of_chosen(), samples)

    def _of_chosen(self) -> list[LayerCall]:
        """With the parameters that are left."""
        mine = set(self.parameters.values())
        chosen = [part.copy() for part in self.parts]
        for part in chosen:
            part.parameters = {r: p for r, p in part.parameters.items() if p in mine}
        return [part for part in chosen if part.parameters]
