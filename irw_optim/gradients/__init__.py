"""How G, the matrix of per-sample gradients, is multiplied: engines behind one protocol."""

from .autodiff import AutodiffGradients, materialized_by_loop
from .layers import LayerCall
from .protocol import Direction, MaterializedGradients, PerSampleGradients, StackedGradients
from .rules import layer_rule

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
