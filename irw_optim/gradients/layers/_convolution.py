"""Convolutions, through the operation that autograd itself uses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.protocol import Direction


class ConvolutionCall(LayerCall):
    """Convolutions and transposed ones of any dimension, in the terms of ``aten.convolution``."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.weight = weight.detach()
        self.settings = list(settings.values())

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The part that the weight computes; the bias goes by its rows."""
        return torch.ops.aten.convolution(input, values["weight"], None, *self.settings)  # type: ignore[no-any-return]

    @cached_property
    def bias_rows(self) -> Tensor:
        return self.b.flatten(2).sum(2)

    def dot(self, direction: Direction) -> Tensor:
        values = self.values_in(direction)
        bias = values.pop("bias", None)
        total = super().dot(direction) if values else self.b.new_zeros(len(self.b))
        return total if bias is None else total + self.bias_rows @ bias

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        result: dict[Tensor, Tensor] = {}
        for role, parameter in self.parameters.items():
            if role == "bias":
                result[parameter] = weights.in_dtype(self.bias_rows.dtype) @ self.bias_rows
            else:
                result[parameter] = self.weight_gradient(*self.used_rows(weights))
        return result

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        return {
            p: b.flatten(2).sum((0, 2)) if role == "bias" else self.weight_gradient(input, b)
            for role, p in self.parameters.items()
        }

    def weight_gradient(self, a: Tensor, b: Tensor) -> Tensor:
        """As autograd computes it, without the gradients of input and bias."""
        result = torch.ops.aten.convolution_backward(
            b, widened(a), widened(self.weight), None, *self.settings, [False, True, False]
        )
        return result[1]  # type: ignore[no-any-return]
