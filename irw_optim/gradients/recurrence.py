"""A recurrent layer's derivative, back through time and forward, in rows as a sequence packs them.

All states are known, so all gates are one product; only what a state hands on goes step by step.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .protocol import widened

RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")  # in torch's order


class Steps:
    """Which rows are of a step, in the order of one direction; ``sizes`` in that of time."""

    def __init__(self, sizes: tuple[int, ...], reverse: bool) -> None:
        self.sizes, self.reverse = sizes, reverse
        self.counts = [*pairwise(sizes[::-1] if reverse else sizes)]

    def of(self, rows: Tensor) -> Sequence[Tensor]:
        """Its rows, a step each."""
        parts = torch.split_with_sizes(rows, self.sizes)
        return parts[::-1] if self.reverse else parts

    def came(self, rows: Tensor) -> list[Tensor]:
        """From the second step on, the rows of those that were in the one before."""
        parts = _zip(self.of(rows)[1:], self.counts)
        return [p[:before] if before < own else p for p, (before, own) in parts]

    def went(self, rows: Tensor) -> list[Tensor]:
        """Up to the last step but one, the rows of those that are in the next."""
        parts = _zip(self.of(rows)[:-1], self.counts)
        return [p[:after] if after < own else p for p, (own, after) in parts]

    @cached_property
    def before(self) -> Tensor:
        """For each row that of the step before; behind all rows stand the first states."""
        sizes = torch.tensor(self.sizes, device="cpu")
        time = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        starts = sizes.cumsum(0) - sizes
        sequence = torch.arange(len(time), device="cpu") - starts[time]
        there = time + (1 if self.reverse else -1)
        inside = there.clamp(0, len(sizes) - 1)
        exists = (there == inside) & (sequence < sizes[inside])
        return sequence + torch.where(exists, starts[inside], len(time))

    @cached_property
    def first(self) -> Tensor:
        """The rows in which sequences begin, in this direction."""
        begins = (self.before >= len(self.before)).nonzero().squeeze(1)
        return begins[self.before[begins].argsort()]

    @cached_property
    def last(self) -> Tensor:
        """The rows in which they end."""
        return steps_of(self.sizes, not self.reverse).first


steps_of = lru_cache(maxsize=64)(Steps)


class Recurrence(NamedTuple):
    """The derivative of one direction at R rows: slopes (R, H), or (R, gates, H).

    A GRU has four gates: r, z, and what the new one reads of the state, and of the inputs.
    """

    before: Tensor  # the state before each
    slopes: Tensor  # of a state by its gates; of an LSTM's cell by i, f and g
    kept: Tensor | None = None  # of a state by the one before; of an LSTM's cell
    by_cell: Tensor | None = None  # of an LSTM's state

    @property
    def has_cell(self) -> bool:
        return self.by_cell is not None

    @property
    def of_carried(self) -> slice:
        """The gates of what is kept."""
        return slice(3) if self.has_cell else slice(None)

    @property
    def of_inputs(self) -> Any:
        """The gates that read inputs; those that read states are in front."""
        return [0, 1, 3] if self.kept is not None and not self.has_cell else slice(None)

    def back(
        self,
        steps: Steps,
        weight_hh: Tensor,
        gradients: Tensor | None,
        last: Tensor | None = None,
        last_cell: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the gates, (R, gates, H), of all states and of all cells.

        For those of states, (R, H), and of the last ones, (B, H).
        """
        states, cells = (torch.zeros_like(self.slopes[:, 0]) for _ in range(2))
        if gradients is not None:
            states.copy_(gradients)
        for total, gradient in ((states, last), (cells, last_cell)):
            if gradient is not None:
                total.index_add_(0, steps.last, gradient.to(total.dtype))
        b = torch.empty_like(self.slopes)
        carried = cells if self.has_cell else states
        own, ways = steps.of(states), steps.of(carried.unsqueeze(1))
        found, slopes = (steps.of(t[:, self.of_carried]) for t in (b, self.slopes))
        if self.by_cell is not None:
            into_cells = [*_zip(steps.of(cells), own, steps.of(self.by_cell))]
            outputs = [*_zip(steps.of(self.slopes[:, 3]), own, steps.of(b[:, 3]))]
        leaves = steps.came(b.flatten(1)[:, : len(weight_hh)])
        arrives = steps.went(states)
        if self.kept is not None:
            keeps = [*_zip(steps.went(carried), steps.came(carried), steps.came(self.kept))]
        for step in reversed(range(len(own))):
            if self.has_cell:
                cell, state, slope = into_cells[step]
                cell.addcmul_(state, slope)
                slope, state, to_output = outputs[step]
                torch.mul(slope, state, out=to_output)
            torch.mul(slopes[step], ways[step], out=found[step])
            if step:
                arrives[step - 1].addmm_(leaves[step - 1], weight_hh)
                if self.kept is not None:
                    earlier, here, kept = keeps[step - 1]
                    earlier.addcmul_(here, kept)
        return b, states, cells

    def back_to_first(
        self, steps: Steps, through: Tensor, states: Tensor, cells: Tensor
    ) -> Sequence[Tensor]:
        """The gradients of first states and cells, with those that came ``through`` gates."""
        if self.kept is None:
            return [through]
        kept, first = self.kept[steps.first], steps.first
        if self.has_cell:
            return through, cells[first] * kept
        return [through.addcmul_(states[first], kept)]

    def forward(
        self,
        inputs: Tensor,
        values: Mapping[str, Tensor],
        change: Tensor | None,
        steps: Steps,
        first_state: Tensor | None,
        first_cell: Tensor | None,
        changes: Mapping[str, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """The changes of states and cells, (R, H), for those of inputs, values and first ones."""
        weight_ih, weight_hh = (widened(values[name]) for name in RECURRENT[:2])
        d_ih, d_hh, *d_biases = (changes.get(name) for name in RECURRENT)
        gates = torch.zeros_like(self.slopes)
        count = len(weight_hh) // gates.shape[2]
        for of_part, terms in (
            (self.of_inputs, (_linear(change, weight_ih), _linear(inputs, d_ih), d_biases[0])),
            (slice(count), (_linear(self.before, d_hh), d_biases[1])),
        ):
            for term in terms:
                if term is not None:
                    gates[:, of_part] += term.unflatten(-1, (-1, gates.shape[2]))
        recurrent = weight_hh.t()
        reads = gates.flatten(1)[:, : len(weight_hh)]
        first_kept = first_cell if self.has_cell else first_state
        carried = torch.zeros_like(gates[:, 0])
        if first_state is not None:
            reads.index_add_(0, steps.first, widened(first_state) @ recurrent)
        if first_kept is not None and self.kept is not None:
            carried.index_add_(0, steps.first, self.kept[steps.first] * first_kept)
        states = torch.empty_like(carried) if self.has_cell else carried
        own = [*_zip(*map(steps.of, (gates, self.slopes, carried)))]
        summed = steps.of(gates[:, self.of_carried])
        arrives, leaves = steps.came(reads), steps.went(states)
        if self.kept is not None:
            keeps = [*_zip(steps.came(carried), steps.came(self.kept), steps.went(carried))]
        if self.by_cell is not None:
            outputs = [*_zip(*map(steps.of, (gates[:, 3], self.by_cell, carried, states)))]
        for step, (of_gates, slopes, into) in enumerate(own):
            if step:
                arrives[step - 1].addmm_(leaves[step - 1], recurrent)
                if self.kept is not None:
                    here, kept, earlier = keeps[step - 1]
                    here.addcmul_(kept, earlier)
            of_gates.mul_(slopes)
            into.add_(summed[step].sum(1))
            if self.has_cell:
                output, by_cell, cell, state = outputs[step]
                torch.addcmul(output, by_cell, cell, out=state)
        return states, carried


def linearized(
    kind: str,
    inputs: Tensor,
    states: Tensor,
    steps: Steps,
    first_state: Tensor,
    first_cell: Tensor | None,
    values: Mapping[str, Tensor],
) -> Recurrence:
    """At the states that a layer, of torch's ``kind`` of mode, has computed."""
    weight_ih, weight_hh, *biases = (widened(values[name]) for name in RECURRENT if name in values)
    inputs = widened(inputs)
    before = torch.cat([states, first_state])[steps.before].to(inputs.dtype)
    if kind == "GRU":
        bias_ih, bias_hh = biases or (None, None)
        r, z, new = F.linear(inputs, weight_ih, bias_ih).chunk(3, 1)
        of_r, of_z, of_new = F.linear(before, weight_hh, bias_hh).chunk(3, 1)
        r, z = (r + of_r).sigmoid_(), (z + of_z).sigmoid_()
        new = torch.addcmul(new, r, of_new).tanh_()
        by_new = _tanh(1 - z, new)
        slopes = _sigmoid(by_new * of_new, r), _sigmoid(before - new, z), by_new * r, by_new
        return Recurrence(before, torch.stack(slopes, 1), z)
    total = F.linear(inputs, weight_ih, biases[0] + biases[1] if biases else None)
    total.addmm_(before, weight_hh.t())
    if kind == "RNN_RELU":
        return Recurrence(before, (total > 0).to(total.dtype).unsqueeze(1))
    if kind == "RNN_TANH":
        return Recurrence(before, _tanh(torch.ones_like(total), total.tanh()).unsqueeze(1))
    assert first_cell is not None
    i, f, g, o = total.chunk(4, 1)
    i, f, g, o = i.sigmoid_(), f.sigmoid(), g.tanh_(), o.sigmoid_()
    cells, first_cell = i * g, first_cell.to(i.dtype)
    cells.index_add_(0, steps.first, f[steps.first] * first_cell)
    for cell, kept, earlier in _zip(steps.came(cells), steps.came(f), steps.went(cells)):
        cell.addcmul_(kept, earlier)
    earlier = torch.cat([cells, first_cell])[steps.before]
    squashed = cells.tanh_()
    slopes = _sigmoid(g, i), _sigmoid(earlier, f), _tanh(i, g), _sigmoid(squashed, o)
    return Recurrence(before, torch.stack(slopes, 1), f, by_cell=_tanh(o, squashed))


_sigmoid, _tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
_zip = partial(zip, strict=True)


def _linear(inputs: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return None if inputs is None or weight is None else widened(inputs) @ widened(weight).t()
