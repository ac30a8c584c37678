"""The third way in: Opacus made the per-sample gradients, and the step is told the losses."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.materialized import MaterializedGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting.ranges import check_losses
from irw_optim.weighting.record import StepRecord


def weigh_grad_samples(
    parameters: Iterable[Tensor],
    scored: Container[Tensor],
    losses: Tensor,
    labels: Tensor | None,
    decide: Callable[[PerSampleLosses, PerSampleGradients], StepRecord],
) -> None:
    """Put the weighted sum of ``p.grad_sample`` into ``p.grad``.

    Args:
        parameters: those that are updated.
        scored: those whose gradients make the scores.
        losses: (B,), of the batch that was backpropagated last.
        labels: (B,) classes, or None.
        decide: the weights, from the losses and the rows.

    Raises:
        RuntimeError: a parameter without a ``grad_sample``, or with those of several passes.
        TypeError, ValueError: losses that are no vector, or not of this batch.
    """
    check_losses(losses)
    rows = MaterializedGradients.from_grad_sample(parameters)
    if rows.batch_size != len(losses):
        raise ValueError(
            f"losses has {len(losses)} samples but p.grad_sample has {rows.batch_size}: "
            "expected the losses of the batch that was backpropagated last"
        )
    batch = PerSampleLosses(losses.detach(), losses.detach().mean(), 1.0, labels)
    record = decide(
        batch, MaterializedGradients({p: g for p, g in rows.rows.items() if p in scored})
    )
    for parameter, gradient in rows.combine(record.weights).items():
        parameter.grad = gradient.to(parameter.dtype)
