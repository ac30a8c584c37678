"""Metrics of the distribution of the losses, for which nobody needs a group."""

from __future__ import annotations

import numpy as np

from irw_optim.metrics._inputs import ArrayLike, as_losses
from irw_optim.weighting import worst_off_count
from irw_optim.weighting.ranges import check_alpha


def loss_variance(losses: ArrayLike) -> float:
    """VAR, the variance of the losses over the samples: mean of (loss_i - mean loss)^2.

    Args:
        losses: (N,), finite.

    Raises:
        TypeError: ``losses`` holds no numbers.
        ValueError: ``losses`` is empty, of another shape, or not finite.

    >>> loss_variance([1.0, 1.0, 3.0, 3.0])
    1.0
    """
    return float(as_losses(losses).var())


def worst_alpha_loss(losses: ArrayLike, alpha: float) -> float:
    """The mean of the worst ceil(alpha N) losses: the objective itself, CVaR at level alpha.

    Args:
        losses: (N,), finite.
        alpha: share in (0, 1]; 1 gives the mean loss.

    Raises:
        TypeError: an argument that holds no numbers.
        ValueError: ``losses`` empty, of another shape or not finite; ``alpha`` outside (0, 1].

    >>> worst_alpha_loss([0.1, 2.0, 0.3, 1.0], alpha=0.5)
    1.5
    """
    alpha = check_alpha(alpha)
    ascending = np.sort(as_losses(losses))
    return float(ascending[-worst_off_count(len(ascending), alpha) :].mean())
