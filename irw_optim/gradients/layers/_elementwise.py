"""Parameters that a module adds, multiplies with or expands itself."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights, zeroed
from irw_optim.gradients.layers._gram import gram_of
from irw_optim.gradients.layers._layout import FIRST, Layout, layouts_of
from irw_optim.gradients.materialized import as_matrix, widened
from irw_optim.gradients.protocol import Direction


class ElementwiseCall(LayerCall):
    """A parameter added to a tensor, multiplied with one or expanded, as it broadcasts.

    Args:
        parameter: the parameter, or a view of one (``self.positions[:, :T]``).
        factor: what it is multiplied with; None for a sum.
        output: what was computed, for its shape.
        scale: a number that it is multiplied with besides, as in ``torch.add(x, p, alpha=2)``.
    """

    made_of_b = "reduced"

    def __init__(
        self, parameter: Tensor, factor: Tensor | None, output: Tensor, scale: float = 1
    ) -> None:
        whole = parameter if parameter.is_leaf or parameter._base is None else parameter._base
        # A sum does not read what it adds to, which may be changed in place afterwards.
        shape_alone = output.new_empty(()).expand(output.shape)
        super().__init__(
            shape_alone if factor is None else factor.expand(output.shape), weight=whole
        )
        # What an expanded view repeats is one number of the parameter.
        steps = zip(parameter.shape, parameter.stride(), strict=True)
        self.size = torch.Size(size if stride else 1 for size, stride in steps)
        start = parameter.storage_offset() - whole.storage_offset()
        self.view = self.size, parameter.stride(), start
        self.whole = whole.shape
        self.is_whole = self.size == self.whole and parameter.stride() == whole.stride()
        self.multiplies = factor is not None
        self.scale = scale

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        """Where the parameter is the same for the whole batch."""
        size = self._broadcast_size()
        found = layouts_of(output_shape, batch_size, is_sequence=True)
        return tuple(layout for layout in found if size[layout.dim] == 1)

    def without(self, dropped: Tensor) -> LayerCall:
        part = self.copy()
        part.__dict__["reduced"] = zeroed(self.reduced, dropped)
        return part

    def let_go(self) -> None:
        super().let_go()
        self.__dict__.pop("reduced", None)

    def dot(self, direction: Direction) -> Tensor:
        values = self.values_in(direction)
        if not values:
            return self.b.new_zeros(len(self.b))
        size, stride, start = self.view
        value = values["weight"].contiguous()  # perhaps a part of a longer message
        part = value.as_strided(size, stride, value.storage_offset() + start)
        return as_matrix(self.reduced) @ part.flatten().to(self.reduced.dtype)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        rows = self.reduced
        return self.scatter((weights.in_dtype(rows.dtype) @ as_matrix(rows)).view(self.size))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        parameter = self.parameters["weight"]
        if self.is_whole:
            return {parameter: self.reduced[samples]}
        blocks = [self.scatter(row)[parameter] for row in self.reduced[samples]]
        return {parameter: torch.stack(blocks)}

    def gram(self) -> Tensor:
        return gram_of(self.reduced)

    @cached_property
    def reduced(self) -> Tensor:
        """The gradient of the view, sample by sample: (B, *view)."""
        b = self.b * widened(self.input) if self.multiplies else self.b
        layout = self.layout or FIRST
        size = self._broadcast_size()
        if not layout.fold:
            del size[layout.dim]  # it met the batch, which stands in front now
        stretched = [d for d, n in enumerate(size, start=1) if n == 1 and b.shape[d] != 1]
        rows = b.sum(stretched) if stretched else b
        rows = rows.reshape(len(b), *self.size)
        return rows if self.scale == 1 else rows * self.scale

    def scatter(self, part: Tensor) -> dict[Tensor, Tensor]:
        """From the shape of the view to that of the whole parameter."""
        if self.is_whole:
            return {self.parameters["weight"]: part.view(self.whole)}
        whole = part.new_zeros(self.whole)
        whole.as_strided(*self.view).copy_(part)
        return {self.parameters["weight"]: whole}

    def _broadcast_size(self) -> list[int]:
        """The parameter's sizes, with the dimensions that broadcasting puts in front."""
        return [*[1] * (self.recorded.ndim - len(self.size)), *self.size]
