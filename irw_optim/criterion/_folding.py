"""Folds a criterion's unreduced elements into one loss per sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)


class PerSampleLosses(NamedTuple):
    """The losses of the B samples of a batch and how they make up the criterion's value.

    The ordinary gradient is ``scale * Σ_i (n_i / Σ n) ∇ℓ_i`` with n = ``counts``, for any lengths;
    with equally many elements a sample it is ``scale * (1/B) Σ_i ∇ℓ_i``. A weighting puts weights
    that sum to 1 in the place of n / Σ n.

    Attributes:
        losses: ℓ, shape (B,), differentiable: the mean of each sample's own valid elements, class
            weights included; 0 with gradient 0 where a sample has none.
        value: What the criterion itself returns: a detached scalar of the losses' dtype.
        scale: Detached. 1 for the plain mean, Σn / Σc for torch's mean with class weights c,
            Σn for the sum, the number of elements of a sample for KLDivLoss' ``batchmean``.
        labels: Class of each sample, int64 of shape (B,), if the target is one class per sample,
            else None. Ignored samples keep the criterion's ``ignore_index`` as their label.
        counts: n, valid elements of each sample, int64 of shape (B,), or None if all samples are
            known to have equally many. ``counts == 0`` marks the samples that are ignored
            altogether: they are part of no mean.
        elements: Σn, or None if every sample is one element. With `scale` it makes the value of
            several batches together: a mean divides by the sum of their ``elements / scale``.
        summed: Whether the value is the sum.
    """

    losses: Tensor
    value: Tensor
    scale: Tensor | float
    labels: Tensor | None = None
    counts: Tensor | None = None
    elements: Tensor | float | None = None
    summed: bool = False

    def ordinary_factors(self) -> Tensor:
        """What the ordinary gradient multiplies each loss's gradient with: (B,), detached."""
        losses = self.losses.detach()
        if self.counts is None:
            return torch.full_like(losses, 1 / max(1, len(losses))) * self.scale
        counts = self.counts.to(losses.dtype)
        return counts / counts.sum().clamp(min=1) * self.scale


def fold(
    elements: Tensor,
    batch: int,
    reduction: str,
    *,
    valid: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    labels: Tensor | None = None,
) -> PerSampleLosses:
    """Means over each sample's valid elements, and the value of torch's reduction, without a wait.

    Args:
        elements: Unreduced losses, shape (batch · k, ...), row-major; 0 where not valid.
        batch: Number of samples B.
        reduction: ``"sum"``; anything else divides the sum by the normaliser.
        valid: Which elements count, shape of `elements`; None for all.
        normaliser: What the mean divides the sum by, if not the number of valid elements.
        labels: Passed on.
    """
    detached = elements.detach()
    if valid is None:
        losses, counts = _row_means(elements, batch), None
        total: Tensor | int = elements.numel()
    else:
        losses, counts = _valid_row_means(elements, valid, batch)
        total = torch.count_nonzero(valid)

    scale: Tensor | float = 1.0
    if reduction == "sum":
        value = detached.sum()
        scale = float(total) if isinstance(total, int) else total.to(_wide(elements))
    elif normaliser is not None:
        value = _quotient(detached, normaliser)
        if isinstance(normaliser, Tensor) or normaliser:  # Python's 0/0 raises
            scale = total / normaliser
        if isinstance(scale, Tensor):
            # 0/0, all ignored: torch's value is NaN and its gradient 0, as any number leaves it.
            scale = scale.nan_to_num(1.0, posinf=float("inf"))
    else:
        value = detached.mean() if valid is None else _quotient(detached, total)
    return PerSampleLosses(losses, value, scale, labels, counts, total, reduction == "sum")


def flat(tensor: Tensor) -> Tensor:
    """The tensor itself where it is 1-D already: a view costs time and a node in the graph."""
    return tensor if tensor.dim() == 1 else tensor.reshape(-1)


def _row_means(elements: Tensor, batch: int) -> Tensor:
    if elements.numel() == batch:
        return elements if elements.dim() == 1 else flat(elements)
    rows = elements.reshape(batch, -1)
    return rows.mean(1) if rows.shape[1] else rows.sum(1)  # the mean of nothing would be NaN


def _valid_row_means(elements: Tensor, valid: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    if elements.numel() == batch:
        return flat(elements), flat(valid).long()
    counts = valid.reshape(batch, -1).sum(1)
    return _quotient(elements.reshape(batch, -1), counts.clamp(min=1), 1), counts


def _quotient(elements: Tensor, divisor: Tensor | float, *dim: int) -> Tensor:
    if elements.dtype not in _HALVES:
        return elements.sum(dim or None) / divisor
    # Their sum can overflow, or drop small terms, where the quotient does neither.
    return (elements.sum(dim or None, dtype=torch.float32) / divisor).to(elements.dtype)


def _wide(elements: Tensor) -> torch.dtype:
    return torch.float32 if elements.dtype in _HALVES else elements.dtype
