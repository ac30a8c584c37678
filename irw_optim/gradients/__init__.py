"""How G, the matrix of per-sample gradients, is multiplied: engines behind one protocol."""

from irw_optim.gradients.autodiff import AutodiffGradients, materialized_by_loop
from irw_optim.gradients.layers import LayerCall
from irw_optim.gradients.protocol import (
    Direction,
    MaterializedGradients,
    PerSampleGradients,
    StackedGradients,
)
from irw_optim.gradients.rules import layer_rule

__all__ = [
    "AutodiffGradients",
    "Direction",
    "LayerCall",
    "MaterializedGradients",
    "PerSampleGradients",
    "StackedGradients",
    "layer_rule",
    "materialized_by_loop",
]
