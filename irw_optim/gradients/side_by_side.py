"""Small products put together, where to start an operation costs the most.

Rows of G that exist (of biases, norms, added tables) are columns of one matrix R. Small linear maps
share what is no matrix product: the weighting of b = [b_1 | b_2 | ...] and its sums.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .layers import (
    FIRST,
    ConvolutionCall,
    ElementwiseCall,
    LayerCall,
    LinearCall,
    LinearRowsCall,
    RowsCall,
    RowWeights,
)
from .protocol import WIDER, Direction, as_matrix, widened

FEW = {"cpu": 2**14}
"""So many numbers are copied while an operation starts; elsewhere 2^20."""

PRODUCTS = 2**5
"""So many multiplications are as quick as one number copied."""

Part: TypeAlias = "LayerCall | Rows | LinearMaps"
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
        elif type(call) is LinearCall and call.input.ndim == 2:
            if device != "cpu" and _is_small(call, few):
                maps.setdefault(call.precision, []).append(call)
            else:
                alone.append(call)
        else:
            blocks, rest = _small_rows(call, few)
            for parameter, block in blocks.items():
                rows.setdefault(block.dtype, {})[parameter] = block
            alone += [] if rest is None else [rest]
    alone += [some[0] if len(some) == 1 else LinearMaps(some) for some in maps.values()]
    return [*alone, *map(Rows, rows.values())], meeting


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


def _is_small(call: LinearCall, few: int) -> bool:
    a, b = call.input, call.output_gradient
    products = a.numel() * b.shape[1]
    return "weight" in call.parameters and a.dtype == b.dtype and products <= few * PRODUCTS


def _small_rows(call: LayerCall, few: int) -> tuple[dict[Tensor, Tensor], LayerCall | None]:
    """Rows that are few numbers, and the call without them; None for nothing left."""
    if type(call) is RowsCall:
        numbers = sum(block.numel() for block in call.blocks.values())
        return (call.rows(), None) if numbers <= few else ({}, call)
    if type(call) is ElementwiseCall and call.is_whole:
        return (call.rows(), None) if call.reduced.numel() <= few else ({}, call)
    if isinstance(call, LinearCall | ConvolutionCall) and type(call) is not LinearRowsCall:
        bias = call.parameters.get("bias")
        if bias is not None and call.bias_rows.numel() <= few:
            rest = call.copy()
            rest.parameters = {r: p for r, p in call.parameters.items() if r != "bias"}
            return {bias: call.bias_rows}, rest if rest.parameters else None
    return {}, call


class Rows:
    """Rows of G, (B, *p.shape) for each parameter, as one matrix R, (B, P)."""

    def __init__(self, blocks: dict[Tensor, Tensor]) -> None:
        self.parameters = list(blocks)
        self.sizes = [p.numel() for p in blocks]
        matrices = [as_matrix(block) for block in blocks.values()]
        self.matrix = torch.cat(matrices, dim=1) if len(matrices) > 1 else matrices[0]

    def dot(self, direction: Direction) -> Tensor:
        given = [
            direction[p].flatten() if p in direction else self.matrix.new_zeros(p.numel())
            for p in self.parameters
        ]
        return self.matrix.mv(torch.cat(given).to(self.matrix.dtype))

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        parts = self._sum(weights).split(self.sizes)
        return {p: part.view(p.shape) for p, part in zip(self.parameters, parts, strict=True)}

    def align(self, coefficients: RowWeights) -> Tensor:
        return self.matrix.mv(self._sum(coefficients))

    def _sum(self, weights: RowWeights) -> Tensor:
        return self.matrix.t().mv(weights.values.to(self.matrix.dtype))


class LinearMaps:
    """y_k = a_k W_k^T + bias_k of samples without positions, in one dtype."""

    def __init__(self, calls: Sequence[LinearCall]) -> None:
        self.calls = calls
        gradients = [call.output_gradient for call in calls]
        self.inputs = [call.input for call in calls]
        self.widths = [b.shape[1] for b in gradients]
        self.b = torch.cat(gradients, 1)
        if self.b.dtype in WIDER:
            self.b, self.inputs = widened(self.b), [widened(a) for a in self.inputs]

    def dot(self, direction: Direction) -> Tensor:
        outputs = self.b.new_zeros(self.b.shape)
        for call, a, out in zip(self.calls, self.inputs, self._parted(outputs), strict=True):
            values = call.values_in(direction)
            if "weight" in values:
                torch.mm(a, values["weight"] if call.transposed else values["weight"].t(), out=out)
            if "bias" in values:
                out += values["bias"]
        return outputs.mul_(self.b).sum(1)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        weighted = self.b * weights.values.to(self.b.dtype).unsqueeze(1)
        sums = weighted.sum(0).split(self.widths)
        result: dict[Tensor, Tensor] = {}
        each = zip(self.calls, self.inputs, self._parted(weighted), sums, strict=True)
        for call, a, b, bias in each:
            parameters = call.parameters
            result[parameters["weight"]] = a.t().mm(b) if call.transposed else b.t().mm(a)
            if "bias" in parameters:
                result[parameters["bias"]] = bias
        return result

    def align(self, coefficients: RowWeights) -> Tensor:
        """`dot` after `combine`, in one: b_k times a_k (a_k^T c b_k) + sum of c b_k."""
        weighted = self.b * coefficients.values.to(self.b.dtype).unsqueeze(1)
        sums = weighted.sum(0).split(self.widths)
        outputs = torch.empty_like(self.b)
        parted = zip(self._parted(weighted), self._parted(outputs), sums, strict=True)
        for call, a, (b, out, bias) in zip(self.calls, self.inputs, parted, strict=True):
            if "bias" in call.parameters:
                torch.addmm(bias, a, a.t().mm(b), out=out)
            else:
                torch.mm(a, a.t().mm(b), out=out)
        return outputs.mul_(self.b).sum(1)

    def _parted(self, columns: Tensor) -> Sequence[Tensor]:
        return columns.split(self.widths, 1)  # type: ignore[no-any-return]
