"""Per-sample losses, differentiable, out of any criterion."""

from ._custom import PerSampleLoss
from ._rules import PerSampleLosses
from .attached import per_sample_losses, validate_criterion

__all__ = ["PerSampleLoss", "PerSampleLosses", "per_sample_losses", "validate_criterion"]
