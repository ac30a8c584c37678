"""Linear maps over the last dimension, of whole parameters or of some of their rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall
from irw_optim.gradients.layers._gram import gram_of, gram_of_positions
from irw_optim.gradients.materialized import MEMORY_BOUND, widened
from irw_optim.gradients.protocol import Direction


class LinearCall(LayerCall):
    """y = a W^T + bias over the last dimension; ``transposed`` for W stored as (in, out)."""

    is_sequence = True

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        time_major: bool = False,
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.transposed = transposed
        self.time_major = time_major

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        bias = values.get("bias")
        if "weight" not in values:
            return torch.zeros_like(self.b) if bias is None else bias.expand_as(self.b)
        weight = values["weight"].T if self.transposed else values["weight"]
        return F.linear(input, weight, bias)

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return self.transpose(*self.used_rows(weights))

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        a, b = input.flatten(0, -2), b.flatten(0, -2)
        result: dict[Tensor, Tensor] = {}
        if "weight" in self.parameters:
            weight = a.T @ b if self.transposed else b.T @ a
            result[self.parameters["weight"]] = weight
        if "bias" in self.parameters:
            result[self.parameters["bias"]] = b.sum(0)
        return result

    def gram(self) -> Tensor:
        a, b = widened(self.input), self.b
        if "weight" not in self.parameters:
            return gram_of(b.flatten(1, -2).sum(1) if b.ndim > 2 else b)
        with_bias = "bias" in self.parameters
        if a.ndim == 2:
            return (a @ a.T + with_bias) * (b @ b.T)
        a, b = a.flatten(1, -2), b.flatten(1, -2)
        (batch, length, width_in), width_out = a.shape, b.shape[-1]
        by_positions = (batch * length) ** 2 * (width_in + width_out)
        by_rows = batch * (length + batch) * width_in * width_out
        if by_positions <= by_rows:
            return gram_of_positions(a, b, with_bias)
        gram = gram_of(b.sum(1)) if with_bias else b.new_zeros(batch, batch)
        step = max(1, MEMORY_BOUND // (batch * width_in))
        for some in b.split(step, dim=-1):  # the per-sample weight gradient, some outputs at once
            gram = gram + gram_of(torch.bmm(some.mT, a))
        return gram


class LinearRowsCall(LinearCall):
    """A linear map with some rows of a parameter, as attention slices its input projection."""

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, *, time_major: bool = False
    ) -> None:
        whole = [None if t is None else t if t._base is None else t._base for t in (weight, bias)]
        super().__init__(input, whole[0], whole[1], time_major=time_major)  # type: ignore[arg-type]
        start = weight.storage_offset() // weight.stride(0)
        self.slice = slice(start, start + len(weight))
        self.after = len(whole[0]) - self.slice.stop  # type: ignore[arg-type]

    def values_in(self, direction: Direction) -> dict[str, Tensor]:
        return {role: v[self.slice] for role, v in super().values_in(direction).items()}

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        around = {1: (self.slice.start, self.after), 2: (0, 0, self.slice.start, self.after)}
        parts = super().transpose(input, b)
        return {p: F.pad(part, around[part.ndim]) for p, part in parts.items()}
