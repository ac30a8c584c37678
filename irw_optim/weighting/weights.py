"""How much each sample counts: pure functions of losses and per-sample gradients.

Intrinsic reweighting (IRW) scores a sample by how much a step on it lowers the loss of the
worst-off group S, to first order::

    S   = worst_off(losses, alpha)              # the worst alpha-fraction by loss
    g_S = gradients.combine(S)                  # G^T 1_S
    s   = gradients.dot(g_S)                    # s_i = <g_i, g_S>
    w   = s.clamp(min=0) / s.clamp(min=0).sum()
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from irw_optim.arguments import real_number
from irw_optim.gradients.magnitudes import align_in_range, gram_in_range, unscaled
from irw_optim.gradients.protocol import MaterializedGradients, PerSampleGradients

from .outliers import OutlierFilter, check_filter, outliers_in, returned

ScoreRule = Callable[[Tensor, PerSampleGradients, Tensor], Tensor]
"""``rule(losses, gradients, worst_off) -> scores``, all vectors of shape (B,)."""


def worst_off_count(size: int, alpha: float) -> int:
    """The size of S for ``size`` samples: max(1, ceil(alpha * size)), and 0 for none.

    An exact product is not rounded up, as ``math.ceil(0.07 * 100)``, 8, would be.

    >>> worst_off_count(100, 0.07), worst_off_count(64, 0.2), worst_off_count(3, 0.01)
    (7, 13, 1)
    """
    return min(size, max(1, math.ceil(alpha * size * (1 - ROUNDING))))


ROUNDING = 1e-12  # relative; some thousand times the error of one product
COMPARED_UP_TO = 2048  # samples, whose labels are all compared with each other


def worst_off(losses: Tensor, alpha: float) -> Tensor:
    """The worst alpha-fraction of the samples by loss: S (paper, section III).

    Of losses equal to the last bit the lower index comes first, so the set has exactly
    ``worst_off_count`` members on every input.

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
    check_losses(losses)
    return _mark(torch.zeros_like(losses, dtype=torch.bool), losses.detach(), check_alpha(alpha))


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
        gradients: per-sample, as an engine or a plain (B, P) tensor.
        alpha: lower bound on the share of the smallest group, in (0, 1].
        outliers: drops samples before S is chosen; a `DBSCANFilter` makes this IRWO.
        center: beta >= 0; what the worst-off need beyond what everybody needs.
        labels: (B,) classes; if given, each has the same total weight.
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
    alpha = check_alpha(alpha)
    check_losses(losses)
    check_options(center, mix)
    check_filter(outliers)
    rows = MaterializedGradients.of(gradients) if isinstance(gradients, Tensor) else gradients
    if not isinstance(rows, PerSampleGradients):
        raise TypeError(f"gradients={gradients!r}: expected a tensor of shape (B, P)")
    if rows.batch_size != len(losses):
        wrong = f"losses has {len(losses)} samples but gradients has {rows.batch_size}: "
        raise ValueError(wrong + "expected one loss for each per-sample gradient")
    rule = Alignment(center)
    return weigh(losses, rows, alpha, rule, outliers=outliers, labels=labels, mix=mix).weights


@dataclass(frozen=True)
class Alignment:
    """IRW: s_i = <g_i, G^T c>, ``c_i = 1_S(i) - center * |S| / B``; at 0, the paper's rule."""

    center: float = 0.0
    needs_gradients = True

    def coefficients(self, worst_off: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The vector c, (B,); zero for samples that left the batch."""
        members = worst_off.to(dtype)
        if not self.center:
            return members
        batch = torch.ones_like(members) if kept is None else kept.to(dtype)
        return members - self.center * (members.sum() / batch.sum()) * batch

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        """Scores of a batch, (B,)."""
        coefficients = self.coefficients(worst_off, None, losses.dtype)
        scores, factor, _ = align_in_range(gradients, coefficients)
        return unscaled(scores, factor)


@dataclass(frozen=True)
class Weights:
    """What a rule decided for one batch; see `StepRecord`."""

    worst_off: Tensor
    outliers: Tensor
    scores: Tensor
    weights: Tensor
    fallback: Tensor
    finite: bool | None = None


def weigh(
    losses: Tensor,
    gradients: PerSampleGradients,
    alpha: float,
    rule: ScoreRule,
    *,
    outliers: OutlierFilter | None = None,
    labels: Tensor | None = None,
    mix: float = 0.0,
    counts: Tensor | None = None,
    elements: Tensor | float | None = None,
    removed: Tensor | None = None,
    known: dict[str, bool] | None = None,
) -> Weights:
    """Outliers out, S, scores, weights of one mini-batch; `irw_weights` is the checked front.

    ``counts`` (B,) of 0 leave out samples whose target is ignored, ``removed`` (B,) bool outliers
    that are known. What is ``known`` of batches before lets all be supposed present until a look:
    at ``elements``, their sum, if of one target each.
    """
    given, supposed = counts, None
    if known is not None and counts is not None and not (counts.is_cpu or known.get("absent")):
        single = counts.dtype == torch.bool
        supposed = elements if single and isinstance(elements, Tensor) else counts
        counts = None
    kept = present = None if counts is None else present_of(counts)
    gram, finite, mass, factor = None, None, None, 1.0  # scores are of `factor` times the gradients
    if removed is None and outliers is not None and len(losses):
        gram, factor, look = gram_in_range(gradients, losses, present)
        finite, shown = look.finite, None if look.everybody else present
        removed = outliers_in(unscaled(gram, factor), outliers, shown, finite=finite)
    if removed is not None:
        kept = ~removed if present is None else present & ~removed
    worst, nobody = losses.new_zeros((2, len(losses)), dtype=torch.bool).unbind()
    _mark(worst, losses, alpha, kept)
    if not isinstance(rule, Alignment):
        scores, factor, finite = returned(rule(losses, gradients, worst), len(losses)), 1.0, None
    elif gram is None:
        # Our own products take S as it is, which on the CPU is no sooner done.
        made = losses.is_cpu or rule.center or not hasattr(gradients, "align")
        coefficients = rule.coefficients(worst, kept, losses.dtype) if made else worst
        scores, factor, look = align_in_range(gradients, coefficients, losses, supposed)
        if known is not None and not look.everybody:  # whose loss of 0 may be in S
            known["absent"] = True
            return weigh(losses, gradients, alpha, rule, labels=labels, mix=mix, counts=given)
        finite, mass = look.finite, look.mass
    else:  # G G^T is at hand: G (G^T c) costs nothing more
        scores = gram @ rule.coefficients(worst, kept, gram.dtype)
    # Who is ignored has no gradient, and so a score of 0.
    if kept is not None and (removed is not None or not isinstance(rule, Alignment)):
        scores, mass = scores * kept, None
    positive = scores.relu()
    if mass and labels is None:
        weights, fallback = positive / mass, nobody[0]
    else:
        weights, fallback = normalise(positive, kept, labels)
    if mix:
        weights = (1 - mix) * weights + mix * uniform(weights, kept)
    scores = scores if factor == 1.0 else unscaled(scores, factor)
    return Weights(worst, nobody if removed is None else removed, scores, weights, fallback, finite)


def normalise(
    mass: Tensor, kept: Tensor | None = None, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale non-negative ``mass`` (B,) to sum 1, or to equal sums over the classes of ``labels``.

    Uniform where there is no mass, in the batch or a class; the second answer, 0-dim bool, is
    whether there was none at all. NaN stays NaN.
    """
    total = mass.sum()
    if labels is not None:
        return _by_classes(mass, kept, labels), total == 0
    if total.device.type == "cpu" and total.item():  # looking waits for nothing there
        return mass / total, total.new_zeros((), dtype=torch.bool)
    empty = total == 0
    return torch.where(empty, uniform(mass, kept), mass / total), empty


def _by_classes(mass: Tensor, kept: Tensor | None, labels: Tensor) -> Tensor:
    check_labels(labels, len(mass))
    present = torch.ones_like(mass) if kept is None else kept.to(mass.dtype)
    if mass.device.type == "cpu" or len(mass) > COMPARED_UP_TO:
        _, member = labels.unique(return_inverse=True)
        zeros = mass.new_zeros(len(mass))
        class_mass, class_size = (zeros.index_add(0, member, t)[member] for t in (mass, present))
    else:  # `unique` waits for the device
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        class_mass, class_size = ((same * t).sum(1) for t in (mass, present))
    share = torch.where(class_mass == 0, present / class_size, mass / class_mass)
    classes = (present / class_size.clamp(min=1)).sum()
    return torch.where(present == 0, torch.zeros_like(share), share / classes)


def present_of(counts: Tensor | None) -> Tensor | None:
    """(B,) bool, the samples with a target; None for all, or all where nobody has one."""
    return None if counts is None else (present := counts > 0) | ~present.any()


def uniform(like: Tensor, kept: Tensor | None = None) -> Tensor:
    """Equal weights (B,) over the kept samples, sum 1."""
    if kept is None:
        return torch.full_like(like, 1 / max(1, len(like)))
    return kept.to(like.dtype) / kept.sum()


def _mark(nobody: Tensor, losses: Tensor, alpha: float, kept: Tensor | None = None) -> Tensor:
    size = losses.shape[0]
    if kept is None:
        worst_first = losses.argsort(descending=True, stable=True)
        return nobody.index_fill_(0, worst_first[: worst_off_count(size, alpha)], True)
    worst_first = losses.where(kept, -math.inf).argsort(descending=True, stable=True)
    # Rank r is below `worst_off_count` if r / share is below the number of the kept: no look at it.
    share = alpha * (1 - ROUNDING)
    ranks = torch.linspace(0, (size - 1) / share, size, dtype=torch.float64, device=losses.device)
    return nobody.scatter_(0, worst_first, ranks < kept.sum())


def check_alpha(alpha: object) -> float:
    """``alpha`` as a float, or an error."""
    meaning = "a lower bound on the share of the smallest group, for example alpha=0.2"
    return real_number("alpha", alpha, "(0, 1]", meaning)


def check_losses(losses: object) -> None:
    """Raise unless a vector of floating-point numbers."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses={losses!r}: expected a tensor of shape (B,), one loss a sample")
    if losses.ndim != 1:
        raise ValueError(
            f"losses has shape {tuple(losses.shape)}: expected (B,), one loss a sample; "
            'for example F.cross_entropy(output, target, reduction="none")'
        )
    if not losses.is_floating_point():
        raise TypeError(f"losses has dtype {losses.dtype}: expected a floating-point dtype")


def check_labels(labels: object, size: int) -> None:
    """Raise unless ``size`` whole numbers."""
    wanted = f"expected a tensor of {size} whole numbers, the class of each sample"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}: {wanted}")
    if labels.shape != (size,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}: {wanted}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels has dtype {labels.dtype}: {wanted}")


def check_options(center: object, mix: object) -> None:
    """Raise for options outside their ranges."""
    recommended = "where 0 is the paper's rule, and 1 what we recommend to try"
    real_number("center", center, "[0, inf)", recommended)
    real_number("mix", mix, "[0, 1]", "the share of plain averaging in the weights")
