"""From a batch of losses to the scalar that carries the weighted gradient.

A scheme decides the weights of a batch. A `Weigher` knows what the batch is (that of one backward
pass, of several, or of all processes) and how long the step: what it gives is the factor on the
gradient of every loss at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.optimizer.accumulation import LogicalBatch
from irw_optim.optimizer.backward import Weigh, weighted_loss
from irw_optim.optimizer.passes import Pass, as_one
from irw_optim.weighting.local_scheme import NoRows, Scheme
from irw_optim.weighting.record import StepRecord

Note = Callable[[StepRecord], None]
Finish = Callable[[PerSampleLosses, LossGradients, Callable[[Tensor], bool], Weigh], Tensor]


class Weigher(Protocol):
    """Decides for one or more passes together."""

    scheme: Scheme

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of the passes, (B,)."""

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """The criterion's value, carrying the weighted gradient, by the losses alone."""


def ordinary_loss(batch: PerSampleLosses) -> Tensor:
    """The criterion's value with its own gradient: nobody's samples are weighed."""
    return _with_gradient(batch, batch.ordinary_factors())


def _with_gradient(batch: PerSampleLosses, factors: Tensor) -> Tensor:
    carrier = (factors.to(batch.losses.dtype) * batch.losses).sum()
    return batch.value + (carrier - carrier.detach())  # to the bit, whatever the factors


class OneProcess:
    """Weighs the samples at hand.

    Args:
        scheme: decides the weights.
        note: is told what was decided, when a backward pass runs.
    """

    def __init__(self, scheme: Scheme, note: Note) -> None:
        self.scheme = scheme
        self.note = note

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """Weights times length: the ordinary gradient is sum_j factor_j mean_j."""
        record = self.scheme.decide(as_one(passes), rows)
        self.note(record)
        if len(passes) == 1:
            ((batch, factor),) = passes
            return record.weights * (factor * batch.scale)
        return record.weights * sum(factor * batch.scale for batch, factor in passes)

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """Where the weights are known before backward, ordinary autograd does the rest."""
        record = self.scheme.decide(batch, NoRows(len(batch.losses)))
        loss = _with_gradient(batch, record.weights * batch.scale)
        loss.register_hook(lambda _: self.note(record))
        return loss


def carried_loss(
    batch: PerSampleLosses,
    weigher: Weigher,
    captured: LossGradients,
    scored: Callable[[Tensor], bool],
    logical: LogicalBatch | None = None,
    finish: Finish = weighted_loss,
) -> Tensor:
    """The criterion's value, with the weighted gradient as its gradient.

    Args:
        batch: per-sample losses with their graph.
        weigher: chooses the weights.
        captured: the per-sample gradients.
        scored: which parameters make the scores.
        logical: the passes that this one is weighed with; None for this one alone.
        finish: makes the loss out of rows; that of a sharded model is another.
    """
    if not captured.leaves:
        captured.close()
        return ordinary_loss(batch)
    if logical is not None:
        return logical.loss(batch, captured, scored, weigher.coefficients)
    by_losses = not weigher.scheme.needs_gradients
    if by_losses and not captured.others:
        captured.close()
        return weigher.loss(batch)
    detached = batch._replace(losses=batch.losses.detach())

    def weigh(upstream: Tensor, rows: PerSampleGradients) -> Tensor:
        return weigher.coefficients([Pass(detached, upstream)], rows)

    return finish(detached, captured, scored, weigh)
