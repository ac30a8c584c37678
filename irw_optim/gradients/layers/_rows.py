"""Layers whose rows of G are few numbers: norms, vectors, what is added, multiplied or repeated."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import (
    FIRST,
    LayerCall,
    Layout,
    RowWeights,
    layouts_of,
    zeroed,
)
from irw_optim.gradients.layers._products import gram_of
from irw_optim.gradients.protocol import Direction, MaterializedGradients, as_matrix, widened


class RowsCall(LayerCall):
    """The rows of a call that has its output gradient, in its place."""

    def __init__(self, call: LayerCall) -> None:
        self.blocks = call.rows()
        self.parameters = dict(call.parameters)
        self.input = self.output_gradient = next(iter(self.blocks.values()))
        self.version = self.input._version
        self.made_in = call.precision

    @property
    def precision(self) -> torch.dtype:
        return self.made_in

    def without(self, dropped: Tensor) -> RowsCall:
        part = copy(self)
        part.blocks = {p: zeroed(block, dropped) for p, block in self.blocks.items()}
        return part

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        return {p: self.blocks[p][samples] for p in self.parameters.values()}

    def dot(self, direction: Direction) -> Tensor:
        return MaterializedGradients(self.rows()).dot(direction)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return MaterializedGradients(self.rows()).combine(weights.values)

    def gram(self) -> Tensor:
        return MaterializedGradients(self.rows()).gram()


class NormCall(LayerCall):
    """An affine map after a normalisation.

    The parameters span ``dims`` of the output; negative ones leave the layout of the others free.
    """

    def __init__(
        self,
        input: Tensor,
        normalise: Callable[[Tensor], Tensor],
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.normalise = normalise
        self.dims = dims
        self.is_sequence = min(dims) < 0
        self.features = -min(dims)

    def makes_rows(self, output_shape: torch.Size) -> bool:
        return True

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        b = self.b[samples]
        spanned = {d % b.ndim for d in self.dims}
        others = [d for d in range(1, b.ndim) if d not in spanned]
        blocks = {}
        if "weight" in self.parameters:
            blocks[self.parameters["weight"]] = self.normalised(samples).mul_(b)
        if "bias" in self.parameters:
            blocks[self.parameters["bias"]] = b
        return {p: t.sum(others) if others else t for p, t in blocks.items()}

    def normalised(self, samples: slice) -> Tensor:
        """As a tensor of its own."""
        return self.normalise(widened(self.input[samples]))


class SampleNormCall(NormCall):
    """A norm of each sample: (input - mean) scale, both of as many dimensions as the input."""

    def __init__(
        self,
        input: Tensor,
        mean: Tensor,
        scale: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__(input, torch.clone, dims, weight, bias)
        self.taken = self.mean, self.scale = mean, scale

    def normalised(self, samples: slice) -> Tensor:
        return (widened(self.input[samples]) - self.mean[samples]).mul_(self.scale[samples])

    def settle(self, layout: Layout | None, batch_size: int) -> None:
        super().settle(layout, batch_size)
        if layout is not None:
            self.mean, self.scale = (layout.bring(t, batch_size) for t in self.taken)


class VectorCall(LayerCall):
    """y = a w for a of shape (rows, in) and a vector w: one number for each row."""

    is_sequence = True
    features = 0

    def makes_rows(self, output_shape: torch.Size) -> bool:
        """They are never more numbers than what was read."""
        return True

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        (parameter,) = self.parameters.values()
        a, b = widened(self.input[samples]), self.b[samples]
        a, b = (a.unsqueeze(1), b.unsqueeze(1)) if b.ndim == 1 else (a, b)
        return {parameter: (b.unsqueeze(1) @ a).squeeze(1)}


class ElementwiseCall(LayerCall):
    """A parameter added to a tensor, multiplied with one or expanded, as it broadcasts.

    Args:
        parameter: or a view of one (``self.positions[:, :T]``).
        factor: what it is multiplied with; None for a sum.
        output: for its shape.
        scale: a further factor, as in ``torch.add(x, p, alpha=2)``.
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
        return self.scatter((weights.values.to(rows.dtype) @ as_matrix(rows)).view(self.size))

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
