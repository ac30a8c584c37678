"""The third way in: Opacus made the per-sample gradients, and the step is told the losses."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.graph import walk
from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.gradients.mixing import follow_batch
from irw_optim.optimizer.weighted_backward import WeightedBackward
from irw_optim.processes import several_processes
from irw_optim.weighting.weights import check_losses

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_TOLERANCE_OF_HALF = 5e-2
"""Of the root mean square of the rows' norms; above what products in TF32 and in half lose."""


def weigh_grad_samples(weighted: WeightedBackward, losses: Tensor, labels: Tensor | None) -> None:
    """Put the weighted sum of ``p.grad_sample`` into ``p.grad``."""
    check_losses(losses)
    rows = MaterializedGradients.from_grad_sample(weighted.parameters)
    if rows.batch_size != len(losses):
        raise ValueError(
            f"losses has {len(losses)} samples but p.grad_sample has {rows.batch_size}: "
            "expected the losses of the batch that was backpropagated last"
        )
    if not several_processes():  # whose gradients are averaged, and the rows not
        check_rows(rows.rows)
    batch = PerSampleLosses(losses.detach(), losses.detach().mean(), 1.0, labels)
    scored = set(weighted.scored)
    chosen = MaterializedGradients({p: g for p, g in rows.rows.items() if p in scored})
    record = weighted.scheme.decide(batch, chosen)
    weighted.note(record)
    for parameter, gradient in rows.combine(record.weights).items():
        parameter.grad = gradient.to(parameter.dtype)
    warn_of_mixing(losses, weighted.engine)


def check_rows(rows: dict[Tensor, Tensor]) -> None:
    """Refuse rows, (B, *p.shape) by parameter, that are not those of the gradient at hand.

    It was scaled or clipped since backward, or has parts of which the layers' hooks did not hear.
    One that was cleared says nothing.
    """
    size = len(next(iter(rows.values()))) if rows else 0
    if not size:
        return
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
        return
    factor = product / means
    tolerance = max(_TOLERANCE.get(row.dtype, _TOLERANCE_OF_HALF) for row in rows.values())
    unit = tolerance * (squares / means) ** 0.5 * abs(factor)
    off = max(0.0, grads / means - factor**2) ** 0.5
    if off > unit:
        raise RuntimeError(
            f"p.grad is not the mean of p.grad_sample: it differs by {off / abs(factor):.2g} of "
            "it. Opacus' rows have no part of other terms of the loss, nor of parameters that are "
            f"used outside their layers: {_INSTEAD}"
        )
    if min(abs(factor - 1), abs(factor - size)) > unit:
        raise RuntimeError(
            f"p.grad is {factor:.3g} times the mean of p.grad_sample: a gradient scaler, or "
            "clipping, has changed the one and not the other, of which the step is made: "
            f"{_INSTEAD}, for which scaler.scale(losses) and clipping are what they always are"
        )


_INSTEAD = (
    "expected losses.mean().backward(), and step(losses=losses) at once; or let IRWOptimizer make "
    "the gradients, IRWOptimizer(..., model=model) with the plain model and "
    "optimizer.backward(losses)"
)


def warn_of_mixing(losses: Tensor, engine: Engine) -> None:
    """Say where samples may meet, of which rows show nothing; a backward pass may be over."""
    if losses.grad_fn is None or len(losses) < 2:
        engine.tell(
            logging.INFO,
            "rows",
            "Opacus' rows are taken as they are: only a forward that does not mix the samples "
            "of a batch has exact ones, and losses without their graph do not show it; "
            "irw_optim.verify(model, ...) on the plain model does",
        )
        return
    batch = follow_batch(losses, walk(losses))
    if batch.mixed_by is not None or batch.computes_shared:
        where = batch.mixed_by or "what is computed for all samples together"
        engine.tell(
            logging.WARNING,
            "rows",
            f"samples may meet in the forward (at {where}), and then Opacus' rows are not the "
            "gradients of single losses: irw_optim.verify(model, ...) on the plain model "
            "tells; IRWOptimizer(..., model=model, criterion=criterion) is exact there, too",
        )
