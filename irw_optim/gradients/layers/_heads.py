"""Products with a vector, and linear maps side by side, one for each head or expert."""

from __future__ import annotations

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights
from irw_optim.gradients.layers._layout import Layout
from irw_optim.gradients.layers._precision import inner, operands, product, scaled
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.protocol import Direction


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


class HeadsCall(LayerCall):
    """y_h = a_h W_h for a of shape (heads, rows, in) and W of shape (heads, in, out).

    The batch is among the rows, alone or folded with positions.
    """

    def layouts(self, batch_size: int, output_shape: torch.Size) -> tuple[Layout, ...]:
        """All rows are treated alike."""
        rows = output_shape[1]
        if rows == batch_size:
            return (Layout(1),)
        if batch_size and rows > batch_size and rows % batch_size == 0:
            return Layout(1, "batch major"), Layout(1, "batch minor")
        return ()

    def dot(self, direction: Direction) -> Tensor:
        (parameter,) = self.parameters.values()
        if parameter not in direction:
            return self.b.new_zeros(len(self.b))
        a, b = self._sides()
        return inner(b, a @ direction[parameter].to(a.dtype), in_place=True)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        (parameter,) = self.parameters.values()
        a, b = self._sides()
        a, b = (side.transpose(0, 1).flatten(1, 2) for side in (a, scaled(b, weights.values)))
        return {parameter: product(a.mT, b)}

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        (parameter,) = self.parameters.values()
        a, b = self._sides()
        return {parameter: widened(a[samples].mT @ b[samples])}

    def _sides(self) -> tuple[Tensor, Tensor]:
        """Input and output gradient as (B, heads, positions, width)."""
        a, b = operands(self.input, self.output_gradient)
        return (a.unsqueeze(2), b.unsqueeze(2)) if a.ndim == 3 else (a, b)
