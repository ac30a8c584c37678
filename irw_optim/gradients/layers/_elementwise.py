"""Parameters that a module adds, multiplies with or expands itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights, inner
from irw_optim.gradients.layers._gram import gram_of
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.protocol import Direction


class ElementwiseCall(LayerCall):
    """A parameter added to a tensor, multiplied with one or expanded, as it broadcasts.

    Args:
        parameter: the parameter, or a view of one (``self.positions[:, :T]``).
        factor: what it is multiplied with; None for a sum.
        output: what was computed, for its shape.
    """

    def __init__(self, parameter: Tensor, factor: Tensor | None, output: Tensor) -> None:
        whole = parameter if parameter.is_leaf or parameter._base is None else parameter._base
        # A sum does not read what it adds to, which may be changed in place afterwards.
        shape_alone = output.new_empty(()).expand(output.shape)
        super().__init__(shape_alone if factor is None else factor, weight=whole)
        start = parameter.storage_offset() - whole.storage_offset()
        self.view = parameter.size(), parameter.stride(), start
        self.factor = None if factor is None else self.input
        self.whole = whole.shape

    def find_batch(self, batch_size: int, output_shape: torch.Size) -> bool:
        has_batch_of_its_own = len(self.view[0]) == len(output_shape) and self.view[0][0] != 1
        return output_shape[:1] == (batch_size,) and not has_batch_of_its_own

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if not values:
            return torch.zeros_like(self.b)
        size, stride, start = self.view
        value = values["weight"].contiguous()  # perhaps a part of a longer message
        part = value.as_strided(size, stride, value.storage_offset() + start)
        return part if self.factor is None else part * widened(self.factor)

    def dot(self, direction: Direction) -> Tensor:
        return inner(self.b, self.apply(self.input, self.values_in(direction)))

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return self.scatter(self.reduced().movedim(0, -1) @ weights.values.to(self.b.dtype))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        blocks = [self.scatter(row) for row in self.reduced()[samples]]
        parameter = self.parameters["weight"]
        return {parameter: torch.stack([block[parameter] for block in blocks])}

    def gram(self) -> Tensor:
        return gram_of(self.reduced())

    def reduced(self) -> Tensor:
        """The gradient of the view, sample by sample: (B, *view)."""
        b = self.b if self.factor is None else self.b * widened(self.factor)
        size = self.view[0]
        # Dimensions that broadcasting put in front, but for the batch, then those it stretched.
        b = b.flatten(1, b.ndim - len(size) - 1).sum(1) if b.ndim > len(size) + 1 else b
        if b.ndim == len(size):  # the parameter's own first dimension, of size 1, met the batch
            b = b.unsqueeze(1)
        stretched = [d + 1 for d, n in enumerate(size) if n == 1 and b.shape[d + 1] != 1]
        return b.sum(stretched, keepdim=True) if stretched else b

    def scatter(self, part: Tensor) -> dict[Tensor, Tensor]:
        """From the shape of the view to that of the whole parameter."""
        whole = part.new_zeros(self.whole)
        whole.as_strided(*self.view).copy_(part)
        return {self.parameters["weight"]: whole}
