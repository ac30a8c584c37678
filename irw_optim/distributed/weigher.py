"""The batch of all ranks, on which the scheme of one process decides."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass, counts_of, elements_of
from irw_optim.backward.weighted_loss import Deferred, Weigher, deferred_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.gradients import GlobalGradients, LayerwiseGradients
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting.local_scheme import NoRows


class OverRanks:
    """Weighs the samples of all ranks, every rank alike, and gives this one's its share.

    Args:
        alone: who would weigh this rank's, and whom to tell what was decided.
        ranks: who takes part.
        layout: the parameters that make the scores, in an order that all ranks have.
        most_passes: how many passes are weighed together, at most.
        groups: of the layout, where no more than one is ever whole.
    """

    def __init__(
        self,
        alone: Weigher,
        ranks: Ranks,
        layout: Sequence[Tensor],
        most_passes: int = 1,
        groups: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        self.scheme = copy(alone.scheme)  # a scheme that holds weights goes on to the next batch
        self.note = alone.note
        self.ranks = ranks
        self.layout = layout
        self.most_passes = most_passes
        self.groups = groups

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of this rank, (B_r,).

        DistributedDataParallel averages over the ranks what has to be their sum, so that the
        number of ranks is a factor here.
        """
        ranks = self.ranks
        batch, length = join(passes, ranks, self.most_passes)
        over_ranks = getattr(self.scheme, "over_ranks", None)
        scheme = self.scheme if over_ranks is None else over_ranks(ranks)
        record = scheme.decide(batch, self._over_ranks(rows))
        own = torch.zeros_like(record.worst_off)
        own[ranks.own] = True
        self.note(replace(record, own=own))
        return record.weights[ranks.own] * (ranks.number * length)

    def _over_ranks(self, rows: PerSampleGradients) -> PerSampleGradients:
        if self.groups is not None and isinstance(rows, GhostGradients):
            return LayerwiseGradients(rows, self.ranks, self.groups)
        return GlobalGradients(rows, self.ranks, self.layout)

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """A node between losses and scalar: who goes backward are all, who goes forward may not."""
        detached = batch._replace(losses=batch.losses.detach())
        return deferred_loss(batch.value, FactorsOfLosses(detached, self), [batch.losses])


class FactorsOfLosses(Deferred):
    """Behind a node between losses and scalar, which hands the losses their factors.

    Args:
        batch: the per-sample losses, detached.
        weigher: chooses the factors.
    """

    def __init__(self, batch: PerSampleLosses, weigher: Weigher) -> None:
        self.batch = batch
        self.weigher = weigher

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """The factor of every loss, for the gradient ``upstream`` of the scalar loss."""
        factors = self.weigher.coefficients([Pass(self.batch, upstream)], self.rows(upstream))
        return [factors.to(self.batch.losses.dtype)]

    def rows(self, upstream: Tensor) -> PerSampleGradients:
        """G of this rank; here for rules that look at losses alone."""
        return NoRows(len(self.batch.losses))


def join(
    passes: Sequence[Pass], ranks: Ranks, most_passes: int = 1
) -> tuple[PerSampleLosses, float]:
    """Gather the losses of all ranks, by one all-gather, and the length of their gradient.

    A sum over a batch is a sum over shards. A mean divides by the number of elements, or by the
    class weights in it: both are sums over shards too, and the quotient is taken once they are
    complete. So shards need not be of equal size.

    Returns:
        Losses, labels and counts of all samples, in the order of the ranks, without a graph; and
        the factor on ``sum_i w_i g_i`` that keeps the length of the gradient that one process
        would have on this batch, the factors on the losses included.

    Raises:
        RuntimeError: losses with different factors on different ranks, on all of them alike.
    """
    labelled = all(batch.labels is not None for batch, _ in passes)
    counted = any(batch.counts is not None for batch, _ in passes)
    header: list[float] = [labelled, counted, len(passes)]
    for batch, factor in passes:
        elements = elements_of(batch)
        scale = float(batch.scale)
        header += [elements, elements / scale if elements else 0.0, float(factor)]
    header += [0.0] * (3 * (most_passes - len(passes)))

    headers, rows = ranks.gather_rows(header, torch.cat([_rows(batch) for batch, _ in passes]))
    some = passes[0].batch
    losses, labels, counts = rows.unbind(1)
    joined = PerSampleLosses(
        losses.to(some.losses.dtype),
        some.value,
        1.0,
        labels.long() if all(labelled for labelled, *_ in headers) else None,
        counts.round().long() if any(counted for _, counted, *_ in headers) else None,
    )
    return joined, _length(headers, some.summed)


def _rows(batch: PerSampleLosses) -> Tensor:
    """Loss, label and number of elements of every sample: float64 holds them all exactly."""
    losses = batch.losses.detach().double()
    labels = torch.zeros_like(losses) if batch.labels is None else batch.labels.double()
    return torch.stack([losses, labels.to(losses.device), counts_of(batch).double()], 1)


def _length(headers: Sequence[Sequence[float]], summed: bool) -> float:
    length = 0.0
    for j in range(int(max(passes for _, _, passes, *_ in headers))):
        told = [h[3 + 3 * j : 6 + 3 * j] for h in headers if h[2] > j]
        elements, divisors, factors = zip(*told, strict=True)
        first = factors[0]
        if any(abs(factor - first) > 1e-5 * abs(first) for factor in factors):
            raise RuntimeError(
                f"the losses of the processes carry different factors, {list(factors)}: the "
                "gradient of the batch of all processes has one. Leave out what makes up for "
                "shards of unequal size (it is accounted for), or use "
                "IRWOptimizer(..., worst_off='local')"
            )
        total, divisor = sum(elements), sum(divisors)
        length += first * (total if summed else total / divisor if divisor else 1.0)
    return length
