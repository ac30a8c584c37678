"""How much each sample counts: pure functions of the losses and of the per-sample gradients.

Every rule here gives each sample a score; the weights are the positive parts of the scores,
normalised to sum 1. Intrinsic reweighting (IRW) scores a sample by how much a step on it lowers
the loss of the worst-off group S, to first order::

    S   = worst_off(losses, alpha)              # the worst alpha-fraction by loss
    g_S = gradients.combine(S)                  # G^T 1_S
    s   = gradients.dot(g_S)                    # s_i = <g_i, g_S>
    w   = s.clamp(min=0) / s.clamp(min=0).sum() # sums to 1

CVaR scores membership of S, plain training scores everybody alike. No ``torch.nn`` in this room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.outliers import OutlierFilter

ScoreRule = Callable[[Tensor, PerSampleGradients, Tensor], Tensor]
"""``rule(losses, gradients, worst_off) -> scores``, all vectors of shape (B,)."""


def check_alpha(alpha: object) -> float:
    """Return ``alpha`` as a float, or raise a ValueError that says what is allowed.

    >>> check_alpha(0.2)
    0.2
    """
    allowed = "a number in (0, 1], a lower bound on the share of the smallest group"
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha={alpha!r}: expected {allowed}, for example alpha=0.2")
    if not 0.0 < alpha <= 1.0:  # false for NaN too
        raise ValueError(f"alpha={alpha!r}: expected {allowed}, for example alpha=0.2")
    return float(alpha)


def worst_off_count(size: int, alpha: float) -> int:
    """k = max(1, ceil(alpha * size)), where a product that is exact is not rounded up.

    ``math.ceil(0.07 * 100)`` is 8 in floating point; the share meant is 7.

    Args:
        size: number of samples; 0 gives 0.
        alpha: share in (0, 1].

    >>> worst_off_count(100, 0.07), worst_off_count(64, 0.2), worst_off_count(3, 0.01)
    (7, 13, 1)
    """
    rounding = 1e-12  # relative; some thousand times the error of one product
    return min(size, max(1, math.ceil(alpha * size * (1 - rounding))))


def worst_off(losses: Tensor, alpha: float) -> Tensor:
    """The worst alpha-fraction of the samples by loss: S (paper, section III).

    Of equal losses the lower index comes first, so the set has exactly ``worst_off_count``
    members on every input.

    Args:
        losses: (B,), any float dtype.
        alpha: share in (0, 1].

    Returns:
        (B,) bool, True for the members of S.

    Raises:
        ValueError: alpha outside (0, 1], or losses that are not a vector.

    >>> worst_off(torch.tensor([0.1, 2.0, 0.3, 2.0]), alpha=0.25)
    tensor([False,  True, False, False])
    """
    check_alpha(alpha)
    check_losses(losses)
    return _worst_off(losses, alpha)


def irw_weights(
    losses: Tensor,
    gradients: PerSampleGradients | Tensor,
    alpha: float,
    *,
    outliers: OutlierFilter | None = None,
    center: float = 0.0,
    labels: Tensor | None = None,
    mix: float = 0.0,
) -> Tensor:
    """IRW weights, w_i = max(0, <g_i, g_S>) normalised to sum 1 (paper, section III).

    Args:
        losses: (B,).
        gradients: the per-sample gradients, as an engine or as a plain (B, P) tensor.
        alpha: lower bound on the share of the smallest group, in (0, 1].
        outliers: drops samples before S is chosen; a `DBSCANFilter` makes this IRWO.
        center: beta >= 0; what the worst-off need beyond what everybody needs.
        labels: (B,) class labels; if given, every class present gets the same total weight.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / B.

    Returns:
        (B,) weights that sum to 1; uniform where no score is positive.

    Raises:
        ValueError: an option outside its range, or shapes that do not fit.

    >>> losses = torch.tensor([2.0, 1.0, 0.5])
    >>> gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    >>> irw_weights(losses, gradients, alpha=0.3)
    tensor([0.5000, 0.5000, 0.0000])
    """
    check_alpha(alpha)
    check_losses(losses)
    check_options(center=center, mix=mix)
    rows = MaterializedGradients.of(gradients) if isinstance(gradients, Tensor) else gradients
    if rows.batch_size != len(losses):
        raise ValueError(
            f"losses has {len(losses)} samples but gradients has {rows.batch_size}: "
            "expected one loss for each per-sample gradient"
        )
    rule = Alignment(center)
    return weigh(losses, rows, alpha, rule, outliers=outliers, labels=labels, mix=mix).weights


@dataclass(frozen=True)
class Alignment:
    """IRW: s_i = <g_i, G^T c>, the alignment with what the worst-off group needs.

    ``c_i = 1_S(i) - center * |S| / B``; at ``center=0``, the paper's rule, ``G^T c = g_S``.
    """

    center: float = 0.0
    needs_gradients = True

    def coefficients(self, worst_off: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The vector c, of shape (B,); zero for samples that left the batch."""
        members = worst_off.to(dtype)
        if not self.center:
            return members
        batch = torch.ones_like(members) if kept is None else kept.to(dtype)
        return members - self.center * (members.sum() / batch.sum()) * batch

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        coefficients = self.coefficients(worst_off, None, losses.dtype)
        return gradients.dot(gradients.combine(coefficients))


@dataclass(frozen=True)
class Membership:
    """CVaR: the worst-off share, equally weighted."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        return worst_off.to(losses.dtype)


@dataclass(frozen=True)
class Equality:
    """Plain training: everybody alike."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        return torch.ones_like(losses)


@dataclass(frozen=True)
class Weights:
    """What a rule decided for one batch; all tensors of shape (B,).

    Attributes:
        worst_off: bool, the members of S.
        outliers: bool, the samples that a filter removed; their weight is 0.
        scores: s_i; 0 for removed samples.
        weights: w_i, sums to 1.
        fallback: 0-dim bool, True where no score was positive and the weights are uniform.
    """

    worst_off: Tensor
    outliers: Tensor
    scores: Tensor
    weights: Tensor
    fallback: Tensor


def weigh(
    losses: Tensor,
    gradients: PerSampleGradients,
    alpha: float,
    rule: ScoreRule,
    *,
    outliers: OutlierFilter | None = None,
    labels: Tensor | None = None,
    mix: float = 0.0,
) -> Weights:
    """Outliers out, S, scores, weights: the whole of one mini-batch (the local scheme).

    Inputs are taken as checked; `irw_weights` is the checked front.
    """
    if outliers is None or not len(losses):
        removed = torch.zeros_like(losses, dtype=torch.bool)
        worst = _worst_off(losses, alpha)
        scores = rule(losses, gradients, worst)
        kept = None
    else:
        gram = gradients.gram()
        removed = outliers(gram)
        kept = ~removed
        worst = torch.zeros_like(removed)
        worst[kept] = _worst_off(losses[kept], alpha)
        if isinstance(rule, Alignment):  # G G^T is at hand: G (G^T c) costs nothing more
            scores = gram @ rule.coefficients(worst, kept, gram.dtype)
        else:
            scores = rule(losses, gradients, worst)
        scores = scores * kept
    weights, fallback = normalise(scores.clamp(min=0), kept, labels)
    if mix:
        weights = (1 - mix) * weights + mix * uniform(weights, kept)
    return Weights(worst, removed, scores, weights, fallback)


def normalise(
    mass: Tensor, kept: Tensor | None = None, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale non-negative ``mass`` (B,) to sum 1, or to equal sums over the classes of ``labels``.

    Where there is no mass (in the batch, or in a class of it) the weights are uniform. NaN stays
    NaN: a broken score must not look like a uniform batch.

    Returns:
        The weights (B,), and whether there was no mass at all (0-dim bool).

    >>> normalise(torch.tensor([3.0, 1.0, 0.0, 0.0]), labels=torch.tensor([0, 0, 0, 1]))[0]
    tensor([0.3750, 0.1250, 0.0000, 0.5000])
    """
    total = mass.sum()
    empty = total == 0
    if labels is None:
        return torch.where(empty, uniform(mass, kept), mass / total), empty
    present = torch.ones_like(mass) if kept is None else kept.to(mass.dtype)
    classes, member = labels.unique(return_inverse=True)
    zeros = mass.new_zeros(len(classes))
    class_mass = zeros.index_add(0, member, mass)[member]
    class_size = zeros.index_add(0, member, present)
    share = torch.where(class_mass == 0, present / class_size[member], mass / class_mass)
    weights = share / (class_size > 0).sum()
    return torch.where(present == 0, torch.zeros_like(weights), weights), empty


def uniform(like: Tensor, kept: Tensor | None = None) -> Tensor:
    """Equal weights (B,) over the kept samples, sum 1."""
    if kept is None:
        return torch.full_like(like, 1 / max(1, len(like)))
    return kept.to(like.dtype) / kept.sum()


def check_losses(losses: object) -> None:
    """Raise unless ``losses`` is a vector of floating-point numbers."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses={losses!r}: expected a tensor of shape (B,), one loss a sample")
    if losses.ndim != 1:
        raise ValueError(
            f"losses has shape {tuple(losses.shape)}: expected (B,), one loss a sample; "
            'for example F.cross_entropy(output, target, reduction="none")'
        )
    if not losses.is_floating_point():
        raise TypeError(f"losses has dtype {losses.dtype}: expected a floating-point dtype")


def check_options(*, center: object = 0.0, mix: object = 0.0, warmup_steps: object = 0) -> None:
    """Raise for options of `IRWOptimizer` and `irw_weights` outside their ranges."""
    for name, value, low, high, meaning in (
        ("center", center, 0.0, math.inf, "0 is the paper's rule, 1 what we recommend to try"),
        ("mix", mix, 0.0, 1.0, "the share of plain averaging in the weights"),
    ):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r}: expected a number ({meaning})")
        if not low <= value <= high or math.isinf(value):
            bounds = f"[{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
            raise ValueError(f"{name}={value!r}: expected a number in {bounds} ({meaning})")
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int):
        raise TypeError(f"warmup_steps={warmup_steps!r}: expected a whole number of steps")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps!r}: expected 0 or more steps")


def _worst_off(losses: Tensor, alpha: float) -> Tensor:
    order = losses.detach().sort(descending=True, stable=True).indices
    mask = torch.zeros_like(losses, dtype=torch.bool)
    mask[order[: worst_off_count(len(losses), alpha)]] = True
    return mask
