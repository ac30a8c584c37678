"""Layers whose rows of G are few numbers (norms, vectors, sums and products), and tables."""

from collections.abc import Callable, Mapping
from copy import copy
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.protocol import Direction, MaterializedGradients, as_matrix, widened

from ._call import FIRST, LayerCall, Layout, RowWeights, layouts_of, zeroed
from ._products import gram_of, gram_of_positions


class RowsCall(LayerCall):
    """The rows of a call, in its place."""

    def __init__(self, call: LayerCall) -> None:
        self.blocks = call.rows()
        self.parameters = dict(call.parameters)
        self.recorded = self.input = self.output_gradient = next(iter(self.blocks.values()))
        self.version = self.input._version
        self.made_in = call.precision

    @property
    def precision(self) -> torch.dtype:
        return self.made_in

    def without(self, dropped: Tensor) -> "RowsCall":
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
    """An affine map after a normalisation, with parameters along ``dims`` of the output."""

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
        blocks = {
            p: self.normalised(samples).mul_(b) if role == "weight" else b
            for role, p in self.parameters.items()
        }
        return {p: t.sum(others) if others else t for p, t in blocks.items()}

    def normalised(self, samples: slice) -> Tensor:
        """As a tensor of its own."""
        return self.normalise(widened(self.input[samples]))


class SampleNormCall(NormCall):
    """(input - mean) scale, all of as many dimensions."""

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
    """y = a w for a of shape (rows, in) and a vector w."""

    is_sequence = True
    features = 0

    def makes_rows(self, output_shape: torch.Size) -> bool:
        return True

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        (parameter,) = self.parameters.values()
        a, b = widened(self.input[samples]), self.b[samples]
        a, b = (a.unsqueeze(1), b.unsqueeze(1)) if b.ndim == 1 else (a, b)
        return {parameter: (b.unsqueeze(1) @ a).squeeze(1)}


class ElementwiseCall(LayerCall):
    """A parameter, or a view of one, broadcast to an ``output``: a summand, or times a factor.

    ``scale`` is that of ``torch.add(x, p, alpha=2)``.
    """

    made_of_b = "reduced"
    is_sequence = True

    def __init__(
        self, parameter: Tensor, factor: Tensor | None, output: Tensor, scale: float = 1
    ) -> None:
        whole = parameter if parameter.is_leaf or parameter._base is None else parameter._base
        # What a sum adds to may be changed in place afterwards.
        read = output.new_empty(()) if factor is None else factor
        super().__init__(read.expand(output.shape), weight=whole)
        # What a view repeats is one number.
        steps = zip(parameter.shape, parameter.stride(), strict=True)
        self.size = torch.Size(size if stride else 1 for size, stride in steps)
        start = parameter.storage_offset() - whole.storage_offset()
        self.view = self.size, parameter.stride(), start
        self.whole = whole.shape
        self.is_whole = self.size == self.whole and parameter.stride() == whole.stride()
        self.multiplies = factor is not None
        self.scale = scale

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        size = self._broadcast_size()
        found = layouts_of(output_shape, batch_size, is_sequence=True)
        return tuple(layout for layout in found if size[layout.dim] == 1)

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
        """The gradient of the view: (B, *view)."""
        b = self.b * widened(self.input) if self.multiplies else self.b
        layout = self.layout or FIRST
        size = self._broadcast_size()
        if not layout.fold:
            del size[layout.dim]  # it met the batch, which stands in front now
        stretched = [d for d, n in enumerate(size, start=1) if n == 1 and b.shape[d] != 1]
        rows = (b.sum(stretched) if stretched else b).reshape(len(b), *self.size)
        return rows if self.scale == 1 else rows * self.scale

    def scatter(self, part: Tensor) -> dict[Tensor, Tensor]:
        """The view's numbers in the whole parameter."""
        whole = part.view(self.whole) if self.is_whole else part.new_zeros(self.whole)
        if not self.is_whole:
            whole.as_strided(*self.view).copy_(part)
        return {self.parameters["weight"]: whole}

    def _broadcast_size(self) -> list[int]:
        """With what broadcasting puts in front."""
        return [*[1] * (self.recorded.ndim - len(self.size)), *self.size]


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
        """An index for each position, perhaps."""
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
        """Padding has no gradient."""
        b, padding = super().b, self.padding_idx
        return b if padding is None else b * (self.input != padding).unsqueeze(-1)

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
    """Sums or means of looked-up rows."""

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
        with torch.enable_grad():  # quicker than by a transform
            output = self.apply(input, {"weight": table})
        return {parameter: torch.autograd.grad(output, table, b)[0]}

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        basis = torch.eye(len(self.b), dtype=self.b.dtype, device=self.b.device)[samples]
        table = [self.combine(RowWeights(one))[self.parameters["weight"]] for one in basis]
        return {self.parameters["weight"]: torch.stack(table)}
