"""How weights are chosen: pure functions of losses and per-sample gradients; no ``torch.nn``."""

from irw_optim.weighting.local_scheme import Equality, Membership
from irw_optim.weighting.weights import (
    Alignment,
    ScoreRule,
    Weights,
    irw_weights,
    normalise,
    uniform,
    weigh,
    worst_off,
    worst_off_count,
)

__all__ = [
    "Alignment",
    "Equality",
    "Membership",
    "ScoreRule",
    "Weights",
    "irw_weights",
    "normalise",
    "uniform",
    "weigh",
    "worst_off",
    "worst_off_count",
]
