"""The scheme of one process, deciding on the batch of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass
from irw_optim.backward.weighted_loss import Deferred, deferred_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.gradients import GlobalGradients
from irw_optim.distributed.joining import join
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting.local_scheme import NoRows, Scheme
from irw_optim.weighting.record import StepRecord


class OverRanks:
    """Weighs the samples of all ranks, every rank alike, and gives this one's its share.

    Args:
        scheme: decides the weights, as it would in one process.
        note: is told what was decided for the samples of all ranks.
        ranks: who takes part.
        layout: the parameters that make the scores, in an order that all ranks have.
        most_passes: how many passes are weighed together, at most.
    """

    def __init__(
        self,
        scheme: Scheme,
        note: Callable[[StepRecord], None],
        ranks: Ranks,
        layout: Sequence[Tensor],
        most_passes: int = 1,
    ) -> None:
        self.scheme = copy(scheme)  # a scheme that holds weights goes on to the next batch
        self.note = note
        self.ranks = ranks
        self.layout = layout
        self.most_passes = most_passes

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of this rank, (B_r,).

        DistributedDataParallel averages over the ranks what has to be their sum, so that the
        number of ranks is a factor here.
        """
        ranks = self.ranks
        joined = join(passes, ranks, self.most_passes)
        over_ranks = getattr(self.scheme, "over_ranks", None)
        scheme = self.scheme if over_ranks is None else over_ranks(ranks)
        record = scheme.decide(joined.batch, self.over_ranks(rows))
        own = torch.zeros_like(record.worst_off)
        own[ranks.own] = True
        self.note(replace(record, own=own))
        return record.weights[ranks.own] * (ranks.number * joined.length)

    def over_ranks(self, rows: PerSampleGradients) -> PerSampleGradients:
        """G of the batch of all ranks, from this rank's rows."""
        return GlobalGradients(rows, self.ranks, self.layout)

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """A node between losses and scalar: who goes backward are all, who goes forward may not."""
        return deferred_loss(batch.value, _ByLosses(self, batch), [batch.losses])


class _ByLosses(Deferred):
    """Behind a node that hands the losses their factors."""

    def __init__(self, weigher: OverRanks, batch: PerSampleLosses) -> None:
        self.weigher = weigher
        self.batch = batch._replace(losses=batch.losses.detach())

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        losses = self.batch.losses
        factors = self.weigher.coefficients([Pass(self.batch, upstream)], NoRows(len(losses)))
        return [factors.to(losses.dtype)]
