"""The third way in: Opacus made the per-sample gradients, and the step is told the losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.replicas import several_processes
from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting.ranges import check_losses
from irw_optim.weighting.record import StepRecord

logger = logging.getLogger("irw_optim")

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_TOLERANCE_OF_HALF = 5e-2
"""Of the root mean square of the rows' norms; above what products in TF32 and in half lose."""


def weigh_grad_samples(
    parameters: Iterable[Tensor],
    scored: Container[Tensor],
    losses: Tensor,
    labels: Tensor | None,
    decide: Callable[[PerSampleLosses, PerSampleGradients], StepRecord],
) -> None:
    """Put the weighted sum of ``p.grad_sample`` into ``p.grad``.

    What was done to all of ``p.grad`` since backward counts: a gradient scaler that has taken its
    factor out, a norm that was clipped.

    Args:
        parameters: those that are updated.
        scored: those whose gradients make the scores.
        losses: (B,), of the batch that was backpropagated last.
        labels: (B,) classes, or None.
        decide: the weights, from the losses and the rows.

    Raises:
        RuntimeError: a parameter without a ``grad_sample``, or with those of several passes; or
            rows whose sum is not the gradient.
        TypeError, ValueError: losses that are no vector, or not of this batch.
    """
    check_losses(losses)
    rows = MaterializedGradients.from_grad_sample(parameters)
    if rows.batch_size != len(losses):
        raise ValueError(
            f"losses has {len(losses)} samples but p.grad_sample has {rows.batch_size}: "
            "expected the losses of the batch that was backpropagated last"
        )
    factor = 1.0 if several_processes() else factor_since_backward(rows.rows)
    if factor != 1:
        rows = MaterializedGradients({p: g * factor for p, g in rows.rows.items()})
    batch = PerSampleLosses(losses.detach(), losses.detach().mean(), 1.0, labels)
    record = decide(
        batch, MaterializedGradients({p: g for p, g in rows.rows.items() if p in scored})
    )
    for parameter, gradient in rows.combine(record.weights).items():
        parameter.grad = gradient.to(parameter.dtype)


def factor_since_backward(rows: dict[Tensor, Tensor]) -> float:
    """What ``p.grad`` was multiplied with since the backward pass that made the rows.

    Args:
        rows: (B, *p.shape) by parameter.

    Returns:
        c with p.grad = c times the mean of the rows, or their sum; 1 where there is no gradient.

    Raises:
        RuntimeError: there is no such number.
    """
    size = len(next(iter(rows.values()))) if rows else 0
    if not size:
        return 1.0
    product = grads = means = squares = 0.0
    for parameter, row in rows.items():
        mean = row.float().mean(0) if row.element_size() < 4 else row.mean(0)
        squares += float(row.flatten(1).norm(dim=1).double().square().mean())
        means += float(mean.norm()) ** 2
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense().to(mean)
            grads += float(gradient.norm()) ** 2
            product += float((gradient * mean).sum())
    if not (grads and means and math.isfinite(grads + means + squares)):
        return 1.0  # cleared, or looked at elsewhere
    factor = product / means
    tolerance = max(_TOLERANCE.get(row.dtype, _TOLERANCE_OF_HALF) for row in rows.values())
    unit = tolerance * (squares / means) ** 0.5  # of a factor
    off = max(0.0, grads / means - factor**2) ** 0.5
    if off > unit * abs(factor):
        raise RuntimeError(
            f"p.grad is not the mean of p.grad_sample: it differs by {off / abs(factor):.2g} of "
            "it. Opacus' rows have no part of other terms of the loss, nor of parameters that are "
            "used outside their layers: expected losses.mean().backward() and step(losses=losses) "
            "with nothing between them but a factor on all of p.grad; else let IRWOptimizer make "
            "the gradients, with the plain model and optimizer.backward(losses)"
        )
    for usual in (1.0, float(size), _power_of_two(factor)):  # the mean, the sum, a scaler's
        if abs(factor - usual) <= unit * abs(factor):
            return 1.0 if usual == size else usual
    return factor


def _power_of_two(factor: float) -> float:
    return 2.0 ** round(math.log2(factor)) if factor > 0 else 1.0
