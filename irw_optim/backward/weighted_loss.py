"""From a batch of losses to the scalar that carries the weighted gradient.

A scheme decides the weights of a batch. A `Weigher` knows what the batch is (that of one backward
pass, of several, or of all processes) and how long the step: what it gives is the factor on the
gradient of every loss at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from irw_optim.backward.deferred import Deferred, deferred_loss, seed_of
from irw_optim.backward.passes import Pass, as_one
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting.local_scheme import NoRows, Scheme
from irw_optim.weighting.record import StepRecord

Note = Callable[[StepRecord], None]


class Weigher(Protocol):
    """Decides for one or more passes together."""

    scheme: Scheme
    note: Note

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
        if len(passes) == 1:
            ((batch, factor),) = passes
            plain_mean = isinstance(batch.scale, float) and batch.scale == 1.0
            return record.weights * (factor if plain_mean else factor * batch.scale)
        return record.weights * sum(factor * batch.scale for batch, factor in passes)

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """Where the weights are known before backward, ordinary autograd does the rest."""
        record = self.scheme.decide(batch, NoRows(len(batch.losses)))
        loss = with_gradient(batch, record.weights * batch.scale)
        loss.register_hook(lambda _: self.note(record))
        return loss


def weighted_loss(
    batch: PerSampleLosses,
    captured: LossGradients,
    scored: Callable[[Tensor], bool],
    weigher: Weigher,
) -> Tensor:
    """The criterion's value, whose gradient is ``sum_i c_i grad(loss_i)``.

    That of what is not the model's (inputs, other networks) is the ordinary one.

    Args:
        batch: the per-sample losses, detached.
        captured: their gradients.
        scored: which parameters' gradients make the score.
        weigher: chooses the factors c when the gradients are known.
    """
    weighted = WeightedPass(batch, captured, scored, weigher)
    weighted.leaves = (*captured.leaves, *captured.others)
    return deferred_loss(batch.value, weighted, weighted.leaves)


class BatchPass(Deferred):
    """The backward pass of one batch that is weighed.

    Args:
        batch: the per-sample losses, detached.
        captured: their gradients.
        scored: which leaves' gradients make the score.
        weigher: chooses the factors.
    """

    captured: LossGradients

    def __init__(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
    ) -> None:
        self.captured = captured
        self.batch = batch
        self.scored = scored
        self.weigher = weigher


class WeightedPass(BatchPass):
    """One that is weighed by itself, and gives the leaves their gradients."""

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Weigh, and sum up."""
        captured, batch = self.captured, self.batch
        total: dict[Tensor, Tensor] = {}
        others = captured.others and list(filter(captured.is_wanted, captured.others))
        weighted = not others or any(map(captured.is_wanted, captured.leaves))
        keep_graph = keep_graph or captured.is_walked_on()
        if weighted:
            captured.start(seed_of(upstream, batch), keep_graph)
        if others:
            factors = upstream * batch.ordinary_factors()
            total |= captured.plain_sum(others, factors, hooks_ran=weighted)
        if weighted:
            rows = captured.rows(self.scored)
            weights = self.weigher.coefficients([Pass(batch, upstream)], rows)
            del rows  # which may hold g_S
            total |= captured.weighted_sum(weights, keep_graph)
        return list(map(total.get, self.leaves))


def ordinary_loss(batch: PerSampleLosses) -> Tensor:
    """The criterion's value with its own gradient: nobody's samples are weighed."""
    return with_gradient(batch, batch.ordinary_factors())


def with_gradient(batch: PerSampleLosses, factors: Tensor) -> Tensor:
    """The criterion's value, with these factors on the gradient of every loss, (B,)."""
    carrier = (factors.to(batch.losses.dtype) * batch.losses).sum()
    return batch.value + (carrier - carrier.detach())  # to the bit, whatever the factors
