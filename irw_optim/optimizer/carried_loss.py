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
from irw_optim.gradients.engine import Engine, LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.optimizer.accumulation import LogicalBatch
from irw_optim.optimizer.backward import Weigh, weighted_loss
from irw_optim.optimizer.passes import Pass, as_one
from irw_optim.weighting.local_scheme import NoRows, Scheme
from irw_optim.weighting.record import StepRecord

Note = Callable[[StepRecord], None]
Finish = Callable[[Tensor, LossGradients, Callable[[Tensor], bool], Weigh], Tensor]


class Weigher(Protocol):
    """Decides for one or more passes together."""

    scheme: Scheme

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of the passes, (B,)."""

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """The criterion's value, carrying the weighted gradient, by the losses alone."""


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
        return record.weights * sum(factor * batch.scale for batch, factor in passes)

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """Where the weights are known before backward, ordinary autograd does the rest."""
        record = self.scheme.decide(batch, NoRows(len(batch.losses)))
        weighted = batch.scale * (record.weights.to(batch.losses.dtype) * batch.losses).sum()
        loss = batch.value + (weighted - weighted.detach())  # to the bit, whatever the weights
        loss.register_hook(lambda _: self.note(record))
        return loss


def carried_loss(
    batch: PerSampleLosses,
    weigher: Weigher,
    engine: Engine,
    scored: Callable[[Tensor], bool],
    logical: LogicalBatch | None = None,
    finish: Finish = weighted_loss,
) -> Tensor:
    """The criterion's value, with the weighted gradient as its gradient.

    Args:
        batch: per-sample losses with their graph.
        weigher: chooses the weights.
        engine: gives the per-sample gradients.
        scored: which parameters make the scores.
        logical: the passes that this one is weighed with; None for this one alone.
        finish: makes the loss out of rows; that of a sharded model is another.
    """
    if logical is not None:
        return logical.loss(batch, engine, scored, weigher.coefficients)
    if not weigher.scheme.needs_gradients:
        return weigher.loss(batch)
    detached = batch._replace(losses=batch.losses.detach())

    def weigh(upstream: Tensor, rows: PerSampleGradients) -> Tensor:
        return weigher.coefficients([Pass(detached, upstream)], rows)

    return finish(batch.value, engine.capture(batch.losses), scored, weigh)
