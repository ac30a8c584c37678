"""Normalisations with an affine map."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights
from irw_optim.gradients.materialized import as_matrix, widened
from irw_optim.gradients.protocol import Direction


class NormCall(LayerCall):
    """An affine map after a normalisation: few parameters, so their rows are made once and kept.

    Args:
        input: what the layer read.
        normalised: the input after normalisation, before the affine map.
        dims: the dimensions of the output that the parameters span; negative ones are counted
            from the end and leave the layout of the others free.
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
        self._rows: dict[Tensor, Tensor] | None = None

    def set_output_gradient(self, gradient: Tensor) -> None:
        super().set_output_gradient(gradient)
        self._rows = None

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        if self._rows is None:
            b = self.b
            spanned = {d % b.ndim for d in self.dims}
            others = [d for d in range(1, b.ndim) if d not in spanned]
            blocks = {}
            if "weight" in self.parameters:
                blocks[self.parameters["weight"]] = self.normalise(widened(self.input)).mul_(b)
            if "bias" in self.parameters:
                blocks[self.parameters["bias"]] = b
            self._rows = {p: t.sum(others) if others else t for p, t in blocks.items()}
        return {p: block[samples] for p, block in self._rows.items()}

    def dot(self, direction: Direction) -> Tensor:
        total = self.b.new_zeros(len(self.b))
        for p, g in self.rows().items():
            if p in direction:
                total = total + as_matrix(g) @ direction[p].flatten()
        return total

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        w = weights.values
        return {p: (w.to(g.dtype) @ as_matrix(g)).view(p.shape) for p, g in self.rows().items()}
