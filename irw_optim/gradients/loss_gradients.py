"""The per-sample gradients behind one vector of losses, from forward to the end of backward."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor

from irw_optim.torch_internals import is_wanted

from .autodiff import AutodiffGradients
from .backward_passes import (
    HOOKS_CHANGE,
    NOTHING,
    RECOMPUTES,
    BackwardPasses,
    End,
    OneForward,
    edges_aside,
)
from .compiled import CompiledGradients
from .compiling import is_compiled
from .coverage import Covering, compare, in_half_precision, probe_of, rows_by, watching
from .engine import Engine
from .ghost import GhostGradients, check_inputs, ghost_gradients
from .graph import NO_GRAPH, CallSite, fingerprint, refuse_reentrant_checkpoints, walk
from .hooks import forget_calls, sites_noted
from .protocol import PerSampleGradients, StackedGradients

NOTHING_TO_SCORE = (
    "the losses do not depend on any parameter that makes the scores: expected losses computed "
    "from the model under torch.enable_grad(), and score_parameters among the trainable "
    "parameters; if the model has got other parameters since, make both optimizers anew"
)

MANY_LOSSES = 8
"""So many others on one graph are worth a word."""

NO_LOSSES = torch.empty(0)

WAITING = WeakSet["LossGradients"]()
"""Losses whose backward pass is to come, in any thread: they may share a graph."""

_LOCK = Lock()


class LossGradients:
    """G, and the sums that a step needs of it.

    Args:
        engine: what is known from earlier batches.
        owns: tells the model's among leaves, or None for all.
        one_product: whether a single G (G^T c) is all that is asked of G.
    """

    def __init__(
        self,
        engine: Engine,
        losses: Tensor,
        owns: Callable[[Sequence[Tensor]], set[Tensor] | None] | None = None,
        *,
        one_product: bool = False,
    ) -> None:
        if engine.hooks is None:
            engine.begin()
        self.engine, self.losses, self.one_product = engine, losses, one_product
        self.graph = graph = walk(losses)
        if engine.has_layer_hooks:
            graph.sites = sites_noted(graph.order)
            engine.sees_fused = any(map(is_compiled, graph.order))
        self.leaves: list[Tensor] = graph.leaves  # those of the model
        self.others: list[Tensor] = []  # inputs, other networks
        own = None if owns is None else owns(graph.leaves)
        if own is not None:
            self.leaves = [leaf for leaf in graph.leaves if leaf in own]
            self.others = [leaf for leaf in graph.leaves if leaf not in own]
        self.apart = False  # whether it is proven, in `start`, that no sample reads another
        self.uncovered = self.finished_by_autograd = self.leaves
        self.ghost: GhostGradients | None = None
        self.came_along: tuple[Sequence[Tensor | None], Tensor] | None = None  # with their seed
        graph.kind = (*fingerprint(losses, graph), one_product, *map(id, self.leaves))
        self.plan = engine.plans.get(graph.kind)
        if self.plan is None:
            refuse_reentrant_checkpoints(graph.order)
        self.sharing: WeakSet[LossGradients] | tuple[()] = ()
        with _LOCK:
            for other in WAITING if len(WAITING) else ():  # to go through none of them takes long
                if not graph.nodes.keys().isdisjoint(other.graph.nodes.keys()):
                    for one, another in ((self, other), (other, self)):
                        one.sharing = one.sharing or WeakSet()
                        one.sharing.add(another)
            WAITING.add(self)
        if len(self.sharing) == MANY_LOSSES:
            engine.tell(
                logging.WARNING,
                "many losses",
                f"{MANY_LOSSES + 1} losses lead through one graph, such as those of time steps: "
                "each is weighed as a batch of its own, at a cost quadratic in their number. For "
                "one batch of sequences call optimizer.backward(torch.stack(losses).mean(0)) with "
                'losses of shape (B,) from reduction="none"',
            )

    def start(self, seed: Tensor, keep_graph: bool, alike: Sequence[Tensor] = ()) -> None:
        """The backward pass to the layers' outputs, with its check where one is due.

        The ``seed`` is 0-dim and not zero. Leaves whose gradient counts all losses ``alike`` get it
        in the same pass if they can.
        """
        size, engine, graph, self.came_along = self.losses.shape[0], self.engine, self.graph, None
        plan = self.plan or engine.plans.get(graph.kind)
        if plan is not None and engine.uses & (engine.uses + 1):  # no check for hooks is due
            if not engine.known.get(RECOMPUTES):
                self.one_forward = NOTHING
            covering, trust = plan.covering, plan.covering.trust
            as_ever = covering.is_settled and not engine.known and trust.uses & (trust.uses + 1)
            if as_ever and (sites := plan.sites(graph, self.losses)) is not None:
                engine.uses += 1
                trust.uses += 1
                graph.sites = sites
                self._take_products(covering, seed, keep_graph, alike)
                return
        with self.one_forward:
            covering = engine.covering(self)
        check_hooks = bool(size) and engine.hook_check_is_due(graph)
        plan = engine.plans.get(graph.kind)
        opaque = plan.opaque if plan and covering.covers_all else {}
        check = bool(size and covering.covered) and engine.check_is_due(covering, bool(opaque))
        unsure = check or check_hooks or opaque or engine.known.get(HOOKS_CHANGE)
        if covering.covers_all and covering.covered and not unsure:
            covering.is_settled = bool(size)
            with self.one_forward:
                self._take_products(covering, seed, keep_graph, alike)
            return
        self.apart = covering.mixed_by is None and size > 1
        passes, covered = self.passes, covering.covered
        last = passes.with_hooks if covering.covers_all else passes.without_hooks
        if check_hooks:
            last = partial(passes.compare_hooks, leaves=self.leaves)
        by = partial(last, weights=seed.expand_as(self.losses))
        if not covered:
            if check_hooks:
                by([])
            return
        sites = [s for s in graph.sites if not covered.isdisjoint(s.call.parameters.values())]
        check_inputs(site.call for site in sites)
        with watching({} if check else opaque, graph, self.losses, engine.random) as flags:
            ghost = ghost_gradients(self.losses, sites, seed, retain_graph=True, backward=by)
        if len(sites) == len(graph.sites):
            covering.reached = ghost.reached
        check = check or bool(flags and torch.stack(flags).any())
        if check or engine.known.get(HOOKS_CHANGE):  # as just found out; a hook may mix samples
            self._check(covering, sites, ghost)
        calls = [site.call for site in sites if site.call.needs_autograd_combine]
        sparse = {p for call in calls for p in call.parameters.values()}
        self.uncovered = [p for p in self.leaves if p not in covered]
        self.finished_by_autograd = [p for p in self.leaves if p not in covered or p in sparse]
        self.ghost = ghost.restricted_to(covered)

    def _take_products(
        self, covering: Covering, seed: Tensor, keep_graph: bool, alike: Sequence[Tensor]
    ) -> None:
        """With nothing left to autograd."""

        def on_to_others(edges: Sequence[End]) -> Sequence[Tensor | None]:
            factors = seed.expand_as(self.losses)
            found = self.passes.with_hooks([*edges, *alike], factors, retain_graph=retain)
            self.came_along = found[len(edges) :], seed
            return found[: len(edges)]

        self.apart = covering.mixed_by is None and self.losses.shape[0] > 1
        self.uncovered = self.finished_by_autograd = []
        retain = keep_graph or bool(self.sharing or (self.others and not alike))
        known, by = covering.reached, on_to_others if alike else None
        self.ghost = ghost = ghost_gradients(
            self.losses, self.graph.sites, seed, retain_graph=retain, reached=known, backward=by
        )
        if len(ghost.calls) != len(known):
            covering.reached = ghost.reached
        if self.engine.compile:
            self.ghost = CompiledGradients(ghost, self.engine)

    def rows(self, parameters: Callable[[Tensor], bool]) -> PerSampleGradients:
        """G with the columns of some parameters."""
        if self.ghost is not None and not self.uncovered and all(map(parameters, self.leaves)):
            return self.ghost
        chosen = list(filter(parameters, self.leaves))
        if self.engine.own is not None and chosen:
            return rows_by(self.engine, self.engine.own, self.losses, chosen, self.passes)
        parts: list[PerSampleGradients] = []
        if self.ghost is not None and (part := self.ghost.restricted_to(set(chosen))).calls:
            parts.append(part)
        if rest := list(filter(parameters, self.uncovered)):
            parts.append(AutodiffGradients(self.losses, rest, self.engine.known, self.passes))
        if not parts:
            raise RuntimeError(NOTHING_TO_SCORE)
        return parts[0] if len(parts) == 1 else StackedGradients(parts)

    def weighted_sum(self, weights: Tensor, keep_graph: bool) -> dict[Tensor, Tensor]:
        """G^T w, for every leaf of the model that has a gradient."""
        total: dict[Tensor, Tensor] = {}
        rest = self.finished_by_autograd
        last = not keep_graph and not self.sharing
        if self.ghost is not None and not rest:
            ghost = self.ghost
            if last:  # nothing else holds a and b then
                if self.engine.has_layer_hooks:
                    forget_calls(self.graph.order)
                self.graph, self.ghost = NO_GRAPH, None
                vars(self).pop("passes", None)
            total = ghost.combine(weights, release=last)
        elif self.ghost is not None:
            total = self.ghost.restricted_to(set(self.leaves).difference(rest)).combine(weights)
        if rest:
            passes = self.passes
            if passes.hooks_ran:
                gradients = passes.without_hooks(rest, weights)
            else:
                aside = edges_aside(self.graph, rest)
                gradients = passes.with_hooks([*rest, *aside], weights, retain_graph=not last)
            total.update((p, g) for p, g in zip(rest, gradients, strict=False) if g is not None)
        for p, g in total.items():
            if g.dtype != p.dtype:
                total[p] = g.to(p.dtype)
        return total

    def plain_sum(
        self, leaves: Sequence[Tensor], factors: Tensor, *, hooks_ran: bool
    ) -> dict[Tensor, Tensor]:
        """The same by ordinary autograd, for any leaves; heard unless ``hooks_ran`` already."""
        if self.came_along is not None:
            found, seed = self.came_along
            gradients = [g if g is None else g * (factors[0] / seed) for g in found]
        else:
            back = self.passes.without_hooks if hooks_ran else self.passes.with_hooks
            gradients = list(back(leaves, factors))
        return {p: g for p, g in zip(leaves, gradients, strict=True) if g is not None}

    def is_wanted(self, leaf: Tensor) -> bool:
        return is_wanted(self.graph.edges[leaf].node)

    def close(self) -> None:
        """Hold nothing of a pass that is over."""
        with _LOCK:
            WAITING.discard(self)
            for other in self.sharing:
                other.sharing.discard(self)  # type: ignore[union-attr]
        engine = self.engine
        if engine.has_layer_hooks and not self.sharing:
            forget_calls(self.graph.order)
        if engine.known.get("row_by_row"):
            engine.left()
        self.ghost = None
        self.losses, self.graph = NO_LOSSES, NO_GRAPH
        vars(self).pop("passes", None)

    @cached_property
    def passes(self) -> BackwardPasses:
        graph, engine = self.graph, self.engine
        assert graph is not NO_GRAPH, "the backward pass is over"
        graph.common = engine.common[graph.kind] = engine.common.get(graph.kind, graph.common)
        return BackwardPasses(self.losses, graph, engine.known, self.one_forward, engine.model)

    @cached_property
    def one_forward(self) -> AbstractContextManager[object]:
        return OneForward(self.engine.model, self.engine.known)

    def _check(self, covering: Covering, sites: list[CallSite], ghost: GhostGradients) -> None:
        """Leave to autograd what it disagrees with."""
        parameters = [p for p in self.leaves if p in covering.covered]
        probe = probe_of(self.losses, self.engine.random)
        wrong = compare(parameters, self.passes.without_hooks(parameters, probe), probe, ghost)
        if in_half_precision(ghost):
            # Autograd's sums over many samples are too rough there to tell.
            one = torch.ones((), device=probe.device)
            by = partial(self.passes.without_hooks, weights=probe)
            rows = ghost_gradients(self.losses, sites, one, retain_graph=True, backward=by)
            sums = rows.combine(torch.ones_like(probe))
            wrong = {p: error for p, error in wrong.items() if p not in covering.alone}
            wrong |= compare(parameters, [sums.get(p) for p in parameters], probe, ghost)
        if wrong:
            self.engine.reject(covering, wrong)
        else:
            covering.agree()
