"""Per-sample losses, differentiable, out of any criterion."""

from irw_optim.criterion._custom import PerSampleLoss
from irw_optim.criterion._rules import PerSampleLosses
from irw_optim.criterion.attached import per_sample_losses, validate_criterion

__all__ = ["PerSampleLoss", "PerSampleLosses", "per_sample_losses", "validate_criterion"]
