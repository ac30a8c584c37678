"""Layers with a weight, in which the output is linear, and a bias, which is added to it."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights
from irw_optim.gradients.protocol import Direction


class AffineCall(LayerCall):
    """A call with the roles ``weight`` and ``bias``.

    A bias has the rows that `bias_rows` sums over the positions; what goes for the weight is said
    by each kind of layer.
    """

    made_of_b = "bias_rows"

    def weight_dot(self, direction: Tensor) -> Tensor:
        """<g_i, v> for the weight alone, v of its shape: (B,)."""
        raise NotImplementedError

    def weight_gradient(self, a: Tensor, b: Tensor, *, narrow: bool = False) -> Tensor:
        """Sum over samples and positions, of the shape of the weight; perhaps an `operand`."""
        raise NotImplementedError

    def weight_rows(self, samples: slice) -> Tensor:
        """The per-sample gradients of the weight: (b, *weight.shape)."""
        raise NotImplementedError

    @cached_property
    def bias_rows(self) -> Tensor:
        """The per-sample gradients of the bias, made once and used three times: (B, out)."""
        raise NotImplementedError

    def without(self, dropped: Tensor) -> LayerCall:
        part = super().without(dropped)
        part.__dict__.pop("bias_rows", None)
        return part

    def dot(self, direction: Direction) -> Tensor:
        values = self.values_in(direction)
        total = self.weight_dot(values["weight"]) if "weight" in values else None
        if "bias" in values:
            bias = self.bias_rows @ values["bias"]
            return bias if total is None else total + bias
        return self.b.new_zeros(len(self.b)) if total is None else total

    def align(self, coefficients: RowWeights) -> Tensor:
        return self.dot(self.combine(coefficients, narrow=True))

    def combine(self, weights: RowWeights, *, narrow: bool = False) -> dict[Tensor, Tensor]:
        result: dict[Tensor, Tensor] = {}
        for role, parameter in self.parameters.items():
            if role == "bias":
                result[parameter] = weights.in_dtype(self.bias_rows.dtype) @ self.bias_rows
            else:
                result[parameter] = self.weight_gradient(*self.used_rows(weights), narrow=narrow)
        return result

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        return {
            p: self.bias_rows[samples] if role == "bias" else self.weight_rows(samples)
            for role, p in self.parameters.items()
        }
