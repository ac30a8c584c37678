"""Convolutions, through the operation that autograd itself uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights
from irw_optim.gradients.materialized import widened


class ConvolutionCall(LayerCall):
    """Convolutions and transposed ones of any dimension, in the terms of ``aten.convolution``."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **settings: Any) -> None:
        super().__init__(input, weight=weight, bias=bias)
        self.weight = weight.detach()
        self.settings = list(settings.values())
        self.channels_out = (
            weight.shape[1] * settings["groups"] if settings["transposed"] else len(weight)
        )

    def apply(self, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        bias = values.get("bias")
        if "weight" not in values:
            shape = (-1, *[1] * (self.b.ndim - 2))
            return torch.zeros_like(self.b) if bias is None else bias.view(shape).expand_as(self.b)
        return torch.ops.aten.convolution(input, values["weight"], bias, *self.settings)  # type: ignore[no-any-return]

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return self.transpose(*self.used_rows(weights))

    def transpose(self, input: Tensor, b: Tensor) -> dict[Tensor, Tensor]:
        wanted = [False, "weight" in self.parameters, "bias" in self.parameters]
        _, *gradients = torch.ops.aten.convolution_backward(
            b, widened(input), widened(self.weight), [self.channels_out], *self.settings, wanted
        )
        roles = zip(("weight", "bias"), gradients, strict=True)
        return {self.parameters[r]: g for r, g in roles if r in self.parameters}
