"""Layers whose rows of G are fewer numbers than what they are made of: made once, used by all."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from irw_optim.gradients.layers._call import LayerCall, RowWeights, zeroed
from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.gradients.protocol import Direction


class RowsCall(LayerCall):
    """The rows of a call, in its place.

    Args:
        call: with its output gradient; it is not kept.
    """

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
