"""The batch of all ranks, on which the scheme of one process decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass, counts_of, elements_of
from irw_optim.backward.weighted_loss import Deferred, Weigher, deferred_loss, seed_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.coverage import Covering
from irw_optim.gradients.ghost import GhostGradients, ghost_gradients
from irw_optim.gradients.graph import gradients_at
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.gradients.recomputation import OneForward
from irw_optim.gradients.verification import Difference, differences, probe_of, wrong_among
from irw_optim.weighting import NoRows

WAY_OUT = (
    "choose score_parameters= without them (score_parameters='last' for the last layer), or train "
    "with DistributedDataParallel, where autodiff takes them"
)


class OverRanks:
    """Weighs the samples of all ranks, every rank alike, and gives this one's its share.

    Args:
        alone: who would weigh this rank's, and whom to tell what was decided.
        ranks: who takes part.
        rows_of_all: makes the rows of all ranks of this rank's.
        most_passes: how many passes are weighed together, at most.
    """

    def __init__(
        self,
        alone: Weigher,
        ranks: Ranks,
        rows_of_all: Callable[[Any, Ranks], PerSampleGradients],
        most_passes: int = 1,
    ) -> None:
        self.scheme = copy(alone.scheme)  # a scheme that holds weights goes on to the next batch
        self.note = alone.note
        self.ranks = ranks
        self.rows_of_all = rows_of_all
        self.most_passes = most_passes

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of this rank, (B_r,).

        DistributedDataParallel averages over the ranks what has to be their sum, so that the
        number of ranks is a factor here.
        """
        ranks = self.ranks
        batch, length = join(passes, ranks, self.most_passes)
        over_ranks = getattr(self.scheme, "over_ranks", None)
        scheme = self.scheme if over_ranks is None else over_ranks(ranks)
        record = scheme.decide(batch, self.rows_of_all(rows, ranks))
        own = torch.zeros_like(record.worst_off)
        own[ranks.own] = True
        self.note(replace(record, own=own))
        return record.weights[ranks.own] * (ranks.number * length)

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """A node between losses and scalar: who goes backward are all, who goes forward may not."""
        detached = batch._replace(losses=batch.losses.detach())
        return deferred_loss(batch.value, FactorsOfLosses(detached, self), [batch.losses])


@dataclass(eq=False)
class FactorsOfLosses(Deferred):
    """Behind a node between losses and scalar, which hands the losses their factors."""

    batch: PerSampleLosses  # detached
    weigher: Weigher

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """The factor of every loss, for the gradient ``upstream`` of the scalar loss."""
        factors = self.weigher.coefficients([Pass(self.batch, upstream)], self.rows(upstream))
        return [factors.to(self.batch.losses.dtype)]

    def rows(self, upstream: Tensor) -> PerSampleGradients:
        """G of this rank; here for rules that look at losses alone."""
        return NoRows(len(self.batch.losses))


@dataclass(eq=False)
class ShardedPass(FactorsOfLosses):
    """The backward pass of one batch, of which all ranks have their part."""

    captured: LossGradients = field()
    scored: Callable[[Tensor], bool]  # which leaves' gradients make the score
    ranks: Ranks
    names_of: Callable[[Iterable[Tensor]], list[str]]

    def rows(self, upstream: Tensor) -> GhostGradients:
        """G of this rank, from a pass that all ranks make alike; the user's is still to come."""
        losses, columns = self.captured.losses, set(filter(self.scored, self.captured.leaves))
        if not columns:
            raise RuntimeError(
                "the losses do not depend on any parameter that makes the scores: expected losses "
                "computed from the model, and score_parameters among its trainable parameters"
            )
        one_forward = OneForward(self.captured.engine.model, self.captured.engine.known)
        with one_forward:
            covering, check = self._agree(columns)
        sites = self.captured.graph.sites
        sites = [s for s in sites if columns.intersection(s.call.parameters.values())]
        for site in sites:
            site.call.forget_values()
        seed = seed_of(upstream, self.batch)
        with one_forward:
            if len(losses):
                ghost = ghost_gradients(losses, sites, seed, retain_graph=True)
                rows = ghost.restricted_to(columns)
            else:  # this rank goes along, since the others need its shards
                edges = [site.edge for site in sites]
                gradients_at(losses, edges, torch.ones_like(losses), retain_graph=True)
                rows = GhostGradients([], 0, seed)
        if check:
            with one_forward:
                self._check(rows, columns)
            if covering is not None:
                covering.agree()
        one_forward.start_over()
        return rows

    def _agree(self, columns: set[Tensor]) -> tuple[Covering | None, bool]:
        """What is known of the products of this rank's batch, if it has one, and whether to check.

        All ranks check where one has to, and refuse what one does not cover: an all-gather of 2.
        """
        batch = self.captured
        missing: set[Tensor] = set()
        covering, due = None, False
        if len(batch.losses):
            covering = batch.engine.covering(batch, sharded=True)
            missing, due = columns - covering.covered, batch.engine.check_is_due(covering)
        told = self.ranks.each(batch.losses.new_tensor([bool(missing), due]))
        anything_missing, check = told.amax(0).tolist()
        if anything_missing:
            raise NotImplementedError(
                "under fully_shard the scores are ghost products, and they do not cover "
                f"{self._of_all_ranks(missing)}: {WAY_OUT}"
            )
        return covering, bool(check)

    def _check(self, rows: GhostGradients, columns: set[Tensor]) -> None:
        """Compare the products with autograd's own gradients, each layer's as it arrives."""
        losses = self.captured.losses
        probe = probe_of(losses, self.captured.engine.random)
        found: dict[Tensor, Difference] = {}

        def compare(leaf: Tensor) -> None:
            truth = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            claim = rows.restricted_to({leaf}).combine(probe).get(leaf)
            (found[leaf],) = differences([leaf], [truth], [claim], rows)
            leaf.grad = None

        with ExitStack() as undo:
            for leaf in columns:
                undo.callback(setattr, leaf, "grad", leaf.grad)
                leaf.grad = None
                undo.callback(leaf.register_post_accumulate_grad_hook(compare).remove)
            torch.autograd.backward(losses, probe, retain_graph=True, inputs=list(columns))
            for leaf in columns - found.keys():  # autograd has none
                compare(leaf)
        names = self._of_all_ranks(wrong_among(list(found.values())))
        if names:
            raise RuntimeError(
                f"the ghost products differ from autograd for {names}: the forward mixes samples "
                f"or uses these parameters outside their layers; {WAY_OUT}"
            )

    def _of_all_ranks(self, parameters: Iterable[Tensor]) -> str:
        told = self.ranks.objects(self.names_of(parameters))
        return ", ".join(sorted({name for names in told for name in names}))


def join(
    passes: Sequence[Pass], ranks: Ranks, most_passes: int = 1
) -> tuple[PerSampleLosses, float]:
    """Gather the losses of all ranks, by one all-gather, and the length of their gradient.

    A mean divides by the number of elements, or by the class weights in it: both are sums over
    shards, and the quotient is taken once they are complete. So shards need not be of equal size.

    Returns:
        Losses, labels and counts of all samples, in the order of the ranks, without a graph; and
        the factor on ``sum_i w_i g_i`` that gives the gradient the length that it would have in
        one process, the factors on the losses included.

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
                f"the losses of the processes carry different factors, {list(factors)}: expected "
                "one. Leave out what makes up for shards of unequal size (it is accounted for), or "
                "use IRWOptimizer(..., worst_off='local')"
            )
        total, divisor = sum(elements), sum(divisors)
        length += first * (total if summed else total / divisor if divisor else 1.0)
    return length
