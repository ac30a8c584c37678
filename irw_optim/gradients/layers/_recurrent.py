"""Recurrent layers whose steps autograd keeps to itself.

A fused LSTM shows the gradient of its states alone. One pass backwards through time makes of it
that of the gates, for which the layer is a linear map of its inputs and another of its states.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import FIRST, LayerCall, Layout, RowWeights
from irw_optim.gradients.layers._linear import LinearCall
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.protocol import Direction

LSTM = 2
"""Among torch's numbers of recurrent cells."""

RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""The weights of a layer, in the order in which torch hands them on."""


class Gates(NamedTuple):
    """An LSTM's inner values, time first."""

    of_states: Tensor  # (T, B, 3, H), what the gradient of a cell gives the gates i, f and g
    of_output: Tensor  # (T, B, H), what the gradient of a state gives the gate o
    to_cell: Tensor  # (T, B, H), what it gives the cell
    forget: Tensor  # (T, B, H), what the cell before gets


def gates_of(
    inputs: Tensor, before: Tensor, first_cell: Tensor, values: Mapping[str, Tensor]
) -> Gates:
    """The inner values of an LSTM that has run, with the state ``before`` each step, (T, B, H)."""
    wide = {name: widened(value) for name, value in values.items()}
    total = inputs @ wide["weight_ih"].t() + before @ wide["weight_hh"].t()
    for name in ("bias_ih", "bias_hh"):
        if name in wide:
            total += wide[name]
    i, f, g, o = total.unflatten(2, (4, -1)).unbind(2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [first_cell.to(i.dtype)]
    for new, kept in zip(i * g, f, strict=True):
        cells.append(torch.addcmul(new, kept, cells[-1]))
    cells_before, squashed = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
    of_states = torch.stack([g * i * (1 - i), cells_before * f * (1 - f), i * (1 - g * g)], dim=2)
    return Gates(of_states, squashed * o * (1 - o), o * (1 - squashed * squashed), f)


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
        state = torch.zeros_like(gates.forget[0])
        cell = torch.zeros_like(state)
        arriving: Tensor | None = None
        if self.output == 0:
            arriving = self._in_order(gradient)
        elif self.output == 1:
            state = gradient.to(state.dtype)
        else:
            cell = gradient.to(state.dtype)
        length, batch, size = gates.forget.shape
        b = gates.forget.new_empty(length, batch, 4, size)
        for t in reversed(range(length)):
            if arriving is not None:
                state = state + arriving[t]
            cell = torch.addcmul(cell, state, gates.to_cell[t])
            torch.mul(gates.of_states[t], cell.unsqueeze(1), out=b[t, :, :3])
            torch.mul(gates.of_output[t], state, out=b[t, :, 3])
            state = b[t].view(batch, 4 * size) @ weight
            cell = cell * gates.forget[t]
        return b.view(length, batch, 4 * size)

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
