"""Small products put together, where to start an operation costs the most.

Rows of G that exist (of biases, norms, added tables), or are few numbers, are columns of one matrix
R. Other linear maps share what is no matrix product: the weighting of b = [b_1 | b_2 | ...].
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from .layers import (
    FIRST,
    AffineCall,
    ElementwiseCall,
    LayerCall,
    LinearCall,
    LinearRowsCall,
    RowsCall,
    RowWeights,
)
from .protocol import Direction, added, as_matrix, wide, widened

FEW = {"cpu": 2**14}
"""So many numbers are copied while an operation starts; elsewhere 2^20."""

Part: TypeAlias = "LayerCall | Columns"
"""Some columns of G, with the products of a layer call."""


def side_by_side(calls: Sequence[LayerCall]) -> tuple[list[Part], list[LayerCall]]:
    """What stands for the calls; and those that share parameters."""
    device = calls[0].input.device.type if calls else "cpu"
    few = FEW.get(device, 2**20)
    shared = _in_several(calls)
    alone: list[Part] = []
    meeting: list[LayerCall] = []
    maps: dict[torch.dtype, list[LinearCall]] = {}
    rows: dict[torch.dtype, dict[Tensor, Tensor]] = {}
    for call in calls:
        if shared and not shared.isdisjoint(call.parameters.values()):
            meeting.append(call)
            continue
        blocks, rest = _small_rows(call, few)
        for parameter, block in blocks.items():
            rows.setdefault(block.dtype, {})[parameter] = block
        if device != "cpu" and _is_small_map(rest, few):
            maps.setdefault(wide(rest.precision), []).append(rest)
        elif rest is not None:
            alone.append(rest)
    joined = [Columns(rows.get(kind, {}), maps.get(kind, ())) for kind in rows | maps]
    return [*alone, *joined], meeting


def _in_several(calls: Sequence[LayerCall]) -> set[Tensor]:
    uses = Counter(p for call in calls for p in call.parameters.values())
    return {p for p, n in uses.items() if n > 1}


def steps_as_one(calls: list[LayerCall]) -> list[LayerCall]:
    """The calls of a small map at every step of time are one, with positions; so are summands.

    What the steps hold is let go.
    """
    if not _in_several(calls):
        return calls
    few = FEW.get(calls[0].input.device.type, 2**20)
    found: dict[object, list[LayerCall]] = {}
    for number, call in enumerate(calls):
        key: object = number
        a, b = call.input, call.output_gradient
        if type(call) is LinearCall and a.ndim == 2 and a.numel() + b.numel() <= few:
            key = (*map(id, call.parameters.values()), call.transposed, a.dtype, b.dtype, a.shape)
        elif type(call) is ElementwiseCall and call.is_whole and b.numel() <= few:
            key = (*map(id, call.parameters.values()), b.dtype, len(b))
        found.setdefault(key, []).append(call)
    return [some[0] if len(some) == 1 else _as_one(some) for some in found.values()]


def _as_one(steps: Sequence[LayerCall]) -> LayerCall:
    one = steps[0].copy()
    if isinstance(one, ElementwiseCall):
        rows = [getattr(step, one.made_of_b) for step in steps]
        vars(one)[one.made_of_b] = torch.stack(rows).sum(0)
        return one
    one.recorded = torch.stack([step.input for step in steps], 1)
    one.settle(FIRST, one.batch_size)
    one.version = one.input._version
    one.set_output_gradient(torch.stack([step.output_gradient for step in steps], 1))
    for step in steps:
        step.let_go()
    return one


def _is_small_map(call: LayerCall | None, few: int) -> TypeGuard[LinearCall]:
    if type(call) is not LinearCall or call.input.ndim > 2 or "bias" in call.parameters:
        return False
    b = call.output_gradient
    return b.dtype == call.input.dtype and b.numel() <= few


def _small_rows(call: LayerCall, few: int) -> tuple[dict[Tensor, Tensor], LayerCall | None]:
    """Rows that are few numbers, and the call without them; None for nothing left."""
    if type(call) is RowsCall:
        numbers = sum(block.numel() for block in call.blocks.values())
        return (call.rows(), None) if numbers <= few else ({}, call)
    if type(call) is ElementwiseCall and call.is_whole:
        return (call.rows(), None) if call.reduced.numel() <= few else ({}, call)
    if not isinstance(call, AffineCall):
        return {}, call
    elsewhere = not call.input.is_cpu
    if elsewhere and call.numbers_in_rows(call.output_gradient.shape) <= few:
        return call.rows(), None
    # On the CPU a map without positions has a kernel, bias included.
    if type(call) is not LinearRowsCall and (elsewhere or call.output_gradient.ndim > 2):
        bias = call.parameters.get("bias")
        if bias is not None and call.bias_rows.numel() <= few:
            rest = call.copy()
            rest.parameters = {r: p for r, p in call.parameters.items() if r != "bias"}
            return {bias: call.bias_rows}, rest if rest.parameters else None
    return {}, call


class Columns:
    """Rows of G, (B, *p.shape) for each parameter, as one matrix R, (B, P); and linear maps.

    They are y_k = a_k W_k^T of samples without positions. Their b stand in front, in one matrix
    with R, of which those are a part that are rows of a bias.
    """

    def __init__(self, blocks: dict[Tensor, Tensor], maps: Sequence[LinearCall] = ()) -> None:
        self.maps = sorted(maps, key=lambda call: call.roles.get("bias") in blocks)
        biases = [call.roles["bias"] for call in self.maps if call.roles.get("bias") in blocks]
        blocks = {p: blocks[p] for p in (*biases, *blocks)}
        self.parameters = list(blocks)
        self.sizes = [p.numel() for p in blocks]
        self.inputs = [widened(call.input) for call in self.maps]
        b = [widened(call.output_gradient) for call in self.maps]
        self.widths = [side.shape[1] for side in b]
        others = len(b) - len(biases)
        matrices = [*b[:others], *map(as_matrix, blocks.values())]
        matrix = torch.cat(matrices, dim=1) if len(matrices) > 1 else matrices[0]
        self.b = matrix[:, : sum(self.widths)]
        self.matrix = matrix[:, sum(self.widths[:others]) :]

    def dot(self, direction: Direction) -> Tensor:
        given = [
            direction[p].flatten() if p in direction else self.matrix.new_zeros(p.numel())
            for p in self.parameters
        ]
        rows = self.matrix.mv(torch.cat([self.matrix.new_zeros(0), *given]).to(self.matrix.dtype))
        return added([rows, *(call.dot(direction) for call in self.maps)])

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        parts = self._sum(weights).split(self.sizes)
        found = {p: part.view(p.shape) for p, part in zip(self.parameters, parts, strict=True)}
        for call, a, b in zip(self.maps, self.inputs, self._weighted(weights), strict=True):
            found[call.parameters["weight"]] = a.t().mm(b) if call.transposed else b.t().mm(a)
        return found

    def align(self, coefficients: RowWeights) -> Tensor:
        """`dot` after `combine`, in one; of maps b_k times a_k (a_k^T c b_k)."""
        rows = self.matrix.mv(self._sum(coefficients))
        if not self.maps:
            return rows
        outputs = torch.empty_like(self.b)
        parted = self._weighted(coefficients), outputs.split(self.widths, 1)
        for a, b, out in zip(self.inputs, *parted, strict=True):
            torch.mm(a, a.t().mm(b), out=out)
        sides = outputs.unsqueeze(1), self.b.unsqueeze(2)
        return torch.baddbmm(rows.view(-1, 1, 1), *sides).view(-1)

    def _sum(self, weights: RowWeights) -> Tensor:
        return self.matrix.t().mv(weights.values.to(self.matrix.dtype))

    def _weighted(self, weights: RowWeights) -> Sequence[Tensor]:
        weighted = self.b * weights.values.to(self.b.dtype).unsqueeze(1) if self.maps else self.b
        return weighted.split(self.widths, 1)  # type: ignore[no-any-return]
