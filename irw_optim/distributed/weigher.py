"""The batch of all ranks, on which the scheme of one process decides."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from irw_optim.backward.weighted_loss import (
    Deferred,
    Pass,
    Weigher,
    counts_of,
    deferred_loss,
    elements_of,
    seed_of,
)
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.backward_passes import OneForward
from irw_optim.gradients.coverage import Covering, Difference, differences, probe_of, wrong_among
from irw_optim.gradients.ghost import GhostGradients, ghost_gradients
from irw_optim.gradients.graph import gradients_at
from irw_optim.gradients.loss_gradients import NOTHING_TO_SCORE, LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting import NoRows

from .ranks import Ranks

WAY_OUT = (
    "choose score_parameters= without them ('last', say), or DistributedDataParallel, where "
    "autodiff takes them"
)


class OverRanks:
    """Weighs the samples of all ranks, every rank alike, as ``alone`` would weigh this one's."""

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
        """The factors on the gradients of this rank's losses, (B_r,)."""
        ranks = self.ranks
        batch, length = join(passes, ranks, self.most_passes)
        over_ranks = getattr(self.scheme, "over_ranks", None)
        scheme = self.scheme if over_ranks is None else over_ranks(ranks)
        record = scheme.decide(batch, self.rows_of_all(rows, ranks))
        own = torch.zeros_like(record.worst_off)
        own[ranks.own] = True
        self.note(replace(record, own=own))
        return record.weights[ranks.own] * (ranks.number * length)  # for DDP averages over ranks

    def loss(self, batch: PerSampleLosses) -> Tensor:
        detached = batch._replace(losses=batch.losses.detach())
        return deferred_loss(batch.value, FactorsOfLosses(detached, self), [batch.losses])


@dataclass(eq=False)
class FactorsOfLosses(Deferred):
    """A node between losses and scalar, which hands the losses their factors."""

    batch: PerSampleLosses  # detached
    weigher: Weigher

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        factors = self.weigher.coefficients([Pass(self.batch, upstream)], self.rows(upstream))
        return [factors.to(self.batch.losses.dtype)]

    def rows(self, upstream: Tensor) -> PerSampleGradients:
        return NoRows(len(self.batch.losses))


@dataclass(eq=False)
class ShardedPass(FactorsOfLosses):
    """With G of this rank."""

    captured: LossGradients = field()
    scored: Callable[[Tensor], bool]  # which leaves' gradients make the score
    ranks: Ranks
    names_of: Callable[[Iterable[Tensor]], list[str]]

    def rows(self, upstream: Tensor) -> GhostGradients:
        """From a pass that all ranks make alike; the user's is to come."""
        losses, columns = self.captured.losses, set(filter(self.scored, self.captured.leaves))
        if not columns:
            raise RuntimeError(NOTHING_TO_SCORE)
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
                gradients_at([losses], edges, [torch.ones_like(losses)], retain_graph=True)
                rows = GhostGradients([], 0, seed)
        if check:
            with one_forward:
                self._check(rows, columns)
            if covering is not None:
                covering.agree()
        one_forward.start_over()
        return rows

    def _agree(self, columns: set[Tensor]) -> tuple[Covering | None, bool]:
        """What is known of this rank's products, and whether all ranks check them."""
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
        """Compare the products with autograd's, each layer's as it arrives."""
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
    """The losses of all ranks in their order, without a graph, and the length of their gradient.

    A mean divides by the number of elements, or their class weights, summed over shards, which need
    not be of equal size.
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
    """Loss, label and number of elements: float64 holds them exactly."""
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
                f"the losses of the processes carry different factors, {list(factors)}: leave out "
                "what makes up for shards of unequal size, which is done, or use "
                "IRWOptimizer(..., worst_off='local')"
            )
        total, divisor = sum(elements), sum(divisors)
        length += first * (total if summed else total / divisor if divisor else 1.0)
    return length
