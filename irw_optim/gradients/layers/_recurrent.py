"""Recurrent layers whose steps autograd keeps to itself.

A fused LSTM shows the gradient of its states alone. One pass backwards through time makes of it
that of the gates, for which the layer is a linear map of its inputs and another of its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers._call import FIRST, LayerCall, Layout, RowWeights
from irw_optim.gradients.layers._linear import LinearCall
from irw_optim.gradients.protocol import Direction, widened

LSTM = 2
"""Among torch's numbers of recurrent cells."""

RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""The weights of a layer, in the order in which torch hands them on."""


class Gates(NamedTuple):
    """What an LSTM's gates i, f, g, o and cells hand on, time first."""

    slopes: Tensor  # (T, B, 4, H), what the gradient of a cell gives i, f and g, of a state o
    to_cell: Tensor  # (T, B, H), what that of a state gives the cell
    forget: Tensor  # (T, B, H), what that of a cell gives the cell before


def gates_of(
    inputs: Tensor, before: Tensor, first_cell: Tensor, values: Mapping[str, Tensor]
) -> Gates:
    """The inner values of an LSTM that has run, with the state ``before`` each step, (T, B, H)."""
    weight_ih, weight_hh, *biases = (widened(values[name]) for name in RECURRENT if name in values)
    total = F.linear(inputs.flatten(0, 1), weight_ih, biases[0] + biases[1] if biases else None)
    total.addmm_(before.flatten(0, 1), weight_hh.t())
    i, f, g, o = total.view(*before.shape[:2], 4, -1).unbind(2)
    i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
    cells = [first_cell.to(i.dtype)]
    for new, kept in zip((i * g).unbind(), f.unbind(), strict=True):
        cells.append(torch.addcmul(new, kept, cells[-1]))
    squashed = torch.stack(cells[1:]).tanh_()
    slopes = [
        torch.ops.aten.sigmoid_backward(g, i),
        torch.ops.aten.sigmoid_backward(torch.stack(cells[:-1]), f),
        torch.ops.aten.tanh_backward(i, g),
        torch.ops.aten.sigmoid_backward(squashed, o),
    ]
    return Gates(torch.stack(slopes, 2), torch.ops.aten.tanh_backward(o, squashed), f)


class LSTMCall(LayerCall):
    """One direction of one layer, over time.

    It read (T, B, d) and computed the states, (T, B, H). The output gradient is that of output 0,
    all states, of 1, the last state, or 2, the last cell. Values and trainable parameters go by the
    names in `RECURRENT`, of which biases may be missing.
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
    ) -> None:
        super().__init__(input, **parameters)
        self.states, self.first_state, self.first_cell = states, first_state, first_cell
        self.values = {name: value.detach() for name, value in values.items()}
        self.output, self.reverse = output, reverse
        self.parts: list[LayerCall] = []

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        """Behind the time in all states, first in the last ones; or several rows a sample."""
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
        inputs, states = self._in_order(widened(self.recorded)), self._in_order(self.states)
        before = torch.cat([self.first_state.unsqueeze(0), states[:-1]]).to(inputs.dtype)
        gates = gates_of(inputs, before, self.first_cell, self.values)
        b = self._back_through_time(gates, widened(gradient))
        self.parts = []
        for side, read in (("ih", inputs), ("hh", before)):
            weight, bias = (self.parameters.get(f"{name}_{side}") for name in ("weight", "bias"))
            part = LinearCall(read, weight, bias)
            part.settle(self.layout._replace(dim=1), self.batch_size)
            part.set_output_gradient(b)
            self.parts += [part] if part.parameters else []

    def _in_order(self, sequence: Tensor) -> Tensor:
        return sequence.flip(0) if self.reverse else sequence

    def _back_through_time(self, gates: Gates, gradient: Tensor) -> Tensor:
        """The gradient of the gates, (T, B, 4 H)."""
        weight = widened(self.values["weight_hh"])
        length, batch, _, size = gates.slopes.shape
        state = cell = gates.forget.new_zeros(batch, size)
        arriving = [state] * length
        if self.output == 0:
            arriving = list(self._in_order(gradient).unbind())
        elif self.output == 1:
            arriving[-1] = gradient.to(state.dtype)
        else:
            cell = gradient.to(state.dtype)
        b = torch.empty_like(gates.slopes)
        of_gates = b.view(length, batch, 4 * size)
        states = zip(b[:, :, :3].unbind(), gates.slopes[:, :, :3].unbind(), strict=True)
        outputs = zip(b[:, :, 3].unbind(), gates.slopes[:, :, 3].unbind(), strict=True)
        ways = zip(gates.to_cell.unbind(), gates.forget.unbind(), strict=True)
        steps = list(zip(arriving, states, outputs, ways, of_gates.unbind(), strict=True))
        later: Tensor | None = None  # the gradient of the gates one step later
        for here, (to_ifg, of_ifg), (to_o, of_o), (to_cell, forget), all_four in reversed(steps):
            state = here if later is None else torch.addmm(here, later, weight)
            cell = torch.addcmul(cell, state, to_cell)
            torch.mul(of_ifg, cell.unsqueeze(1), out=to_ifg)
            torch.mul(of_o, state, out=to_o)
            cell, later = cell * forget, all_four
        return of_gates

    def let_go(self) -> None:
        super().let_go()
        self.states = self.first_state = self.first_cell = self.recorded
        self.parts = []

    def arrangement(self) -> tuple[object, ...]:
        return *super().arrangement(), self.output

    def without(self, dropped: Tensor) -> LayerCall:
        part = copy(self)
        part.parts = [p.without(dropped) for p in self.parts]
        return part

    def dot(self, direction: Direction) -> Tensor:
        products = [part.dot(direction) for part in self._of_chosen()]
        return sum(products[1:], start=products[0])

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return {p: t for part in self._of_chosen() for p, t in part.combine(weights).items()}

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        return {p: t for part in self._of_chosen() for p, t in part.rows(samples).items()}

    def _of_chosen(self) -> list[LayerCall]:
        """The two maps with the parameters that this call still has."""
        mine = set(self.parameters.values())
        chosen = []
        for part in self.parts:
            some = part.copy()
            some.parameters = {r: p for r, p in part.parameters.items() if p in mine}
            if some.parameters:
                chosen.append(some)
        return chosen
