"""Tables looked up by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers._call import FIRST, LayerCall, Layout, RowWeights
from irw_optim.gradients.layers._products import gram_of_positions


class EmbeddingCall(LayerCall):
    """Rows of a table looked up by index."""

    is_sequence = True

    def __init__(
        self, input: Tensor, weight: Tensor, padding_idx: int | None, sparse: bool
    ) -> None:
        super().__init__(input, weight=weight)
        self.table = weight.shape
        self.padding_idx = padding_idx
        self.needs_autograd_combine = sparse

    @property
    def may_lack_batch(self) -> bool:  # type: ignore[override]
        """One index for each position, perhaps."""
        return self.recorded.ndim == 1 or 1 in self.recorded.shape[:2]

    def for_every_sample(self, batch_size: int, dim: int) -> LayerCall | None:
        index = self.recorded
        if index.ndim > 1:
            if index.shape[dim] != 1 or (dim and index.ndim > 2):
                return None
            index = index.squeeze(dim)
        index = index.unsqueeze(dim)
        call = self.copy()
        call.recorded = index.expand(*index.shape[:dim], batch_size, *index.shape[dim + 1 :])
        call.settle(Layout(dim), batch_size)
        return call

    @property
    def b(self) -> Tensor:
        """Padding has no gradient, whatever the output gradient there."""
        b = super().b
        if self.padding_idx is None:
            return b
        return b * (self.input != self.padding_idx).unsqueeze(-1)

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return F.embedding(input, values["weight"])

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        table = b.new_zeros(self.table)
        table = table.index_add(0, input.flatten(), b.reshape(input.numel(), self.table[1]))
        return {self.parameters["weight"]: table}

    def gram(self) -> Tensor:
        index = self.input.reshape(len(self.input), -1)
        b = self.b.reshape(*index.shape, self.table[1])
        return gram_of_positions(index, b, lambda i, other: i.unsqueeze(1) == other)


class EmbeddingBagCall(LayerCall):
    """Sums or means of looked-up rows; the indices may be flat, with offsets."""

    def __init__(self, input: Tensor, weight: Tensor, sparse: bool, **settings: Any) -> None:
        super().__init__(input, weight=weight)
        self.settings = settings
        self.needs_autograd_combine = sparse

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        return (FIRST,) if output_shape[:1] == (batch_size,) else ()

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return F.embedding_bag(input, values["weight"], **self.settings)

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        parameter = self.parameters["weight"]
        table = torch.zeros_like(parameter, dtype=b.dtype, requires_grad=True)
        with torch.enable_grad():
            output = self.apply(input, {"weight": table})
        (gradient,) = torch.autograd.grad(output, table, b)
        return {parameter: gradient}

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        basis = torch.eye(len(self.b), dtype=self.b.dtype, device=self.b.device)[samples]
        table = [self.combine(RowWeights(one))[self.parameters["weight"]] for one in basis]
        return {self.parameters["weight"]: torch.stack(table)}
