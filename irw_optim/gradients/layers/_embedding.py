"""Tables looked up by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights
from irw_optim.gradients.layers._gram import gram_of_lookups


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

    def for_every_sample(self, batch_size: int) -> LayerCall | None:
        index = self.input[0] if self.input.ndim > 1 else self.input
        if self.input.ndim > 1 and self.input.shape[0] != 1:
            return None
        call = self.copy()
        call.input = index.expand(batch_size, *index.shape)
        return call

    @property
    def b(self) -> Tensor:
        """Padding has no gradient, whatever the output gradient there."""
        b = super().b
        if self.padding_idx is None:
            return b
        return b * (self.input != self.padding_idx).unsqueeze(-1)

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return F.embedding(input, values["weight"]) if values else torch.zeros_like(self.b)

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        table = b.new_zeros(self.table)
        table = table.index_add(0, input.flatten(), b.reshape(input.numel(), self.table[1]))
        return {self.parameters["weight"]: table}

    def gram(self) -> Tensor:
        index = self.input.reshape(len(self.input), -1)
        b = self.b.reshape(*index.shape, self.table[1])
        return gram_of_lookups(index, b)


class EmbeddingBagCall(LayerCall):
    """Sums or means of looked-up rows; the indices may be flat, with offsets."""

    def __init__(self, input: Tensor, weight: Tensor, sparse: bool, **settings: Any) -> None:
        super().__init__(input, weight=weight)
        self.settings = settings
        self.needs_autograd_combine = sparse

    def find_batch(self, batch_size: int, output_shape: torch.Size) -> bool:
        return output_shape[:1] == (batch_size,)  # the indices may be flat, with offsets

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if not values:
            return torch.zeros_like(self.b)
        # Half or float, integers stay as they are: `widened` is the identity on indices.
        return F.embedding_bag(input, values["weight"], **self.settings)

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        basis = torch.eye(len(self.b), dtype=self.b.dtype, device=self.b.device)[samples]
        table = [self.combine(RowWeights(one))[self.parameters["weight"]] for one in basis]
        return {self.parameters["weight"]: torch.stack(table)}
