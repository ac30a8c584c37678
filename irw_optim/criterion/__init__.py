"""Per-sample losses, differentiable, out of any criterion.

A criterion hands out one number for a batch. Reweighting needs the B numbers behind it, and the
one factor that keeps the step as long as the ordinary one:

    elements   what the criterion computes before it reduces            (B, ...)
    ℓ_i        the mean of sample i's own valid elements, n_i of them   (B,)
    scale      how often that mean counts in the ordinary gradient

so that for every torch.nn loss, reduction and length

    ordinary gradient = scale · Σ_i (n_i / Σ_j n_j) ∇ℓ_i

and a weighting replaces the n_i / Σ n by weights of its own that sum to 1.
"""

from irw_optim.criterion._custom import PerSampleLoss
from irw_optim.criterion._rules import PerSampleLosses
from irw_optim.criterion.attached import per_sample_losses, validate_criterion

__all__ = ["PerSampleLoss", "PerSampleLosses", "per_sample_losses", "validate_criterion"]
