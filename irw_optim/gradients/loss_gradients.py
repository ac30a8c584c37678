"""The per-sample gradients behind one vector of losses, from forward to the end of backward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.autodiff import AutodiffGradients, backward_to
from irw_optim.gradients.capture import CallSite, Graph
from irw_optim.gradients.coverage import Covering
from irw_optim.gradients.ghost import GhostGradients, ghost_gradients
from irw_optim.gradients.protocol import PerSampleGradients, StackedGradients
from irw_optim.gradients.unheard import pull_back
from irw_optim.gradients.verification import compare, equal, in_half_precision, probe_of

if TYPE_CHECKING:
    from irw_optim.gradients.engine import Engine

logger = logging.getLogger("irw_optim")

HOOKS_CHANGE = "hooks change gradients"
"""What an `Engine` remembers of its model: passes that no hook hears give something else."""


class LossGradients:
    """G, and the sums that a step needs of it.

    Hooks on activations hear one pass: that to the layers' outputs, with the scale of the ordinary
    mean, or, where autodiff does all, the one that gives the weighted gradient.

    Args:
        engine: what is known from earlier batches.
        losses: (B,), with their graph.
        graph: what leads to them.
        owns: which leaves are the model's; None for all.

    Attributes:
        leaves: those of the model.
        others: inputs, and parameters of other networks: their gradient is the plain one.
        rest: leaves that the ghost products do not cover.
    """

    def __init__(
        self,
        engine: Engine,
        losses: Tensor,
        graph: Graph,
        owns: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self.engine = engine
        self.losses = losses
        self.graph = graph
        own = [owns is None or owns(leaf) for leaf in graph.leaves]
        self.leaves = [leaf for leaf, mine in zip(graph.leaves, own, strict=True) if mine]
        self.others = [leaf for leaf, mine in zip(graph.leaves, own, strict=True) if not mine]
        self.node_of: dict[Tensor, Node] = dict(zip(graph.leaves, graph.leaf_nodes, strict=True))
        self.sharing: WeakSet[LossGradients] = WeakSet()
        self.rest = list(self.leaves)
        self.finished_by_autograd = self.rest
        self.ghost: GhostGradients | None = None
        self.heard = False

    def start(self, seed: Tensor, keep_graph: bool) -> None:
        """The backward pass to the layers' outputs, with its check where one is due.

        Args:
            seed: 0-dim, not zero; what the losses carry through it.
            keep_graph: whether somebody else will still walk the graph.
        """
        graph, engine = self.graph, self.engine
        covering = engine.covering(graph, self.leaves, self.losses)
        check = bool(len(self.losses)) and covering.check_is_due()
        if not covering.covered:
            if check:
                self._compare_unheard(seed)
            return
        self.heard = True
        if covering.whole and not check:
            self.rest = self.finished_by_autograd = []
            retain = keep_graph or bool(self.sharing or self.others)
            self.ghost = ghost_gradients(
                self.losses, graph.sites, seed, retain_graph=retain, reached=covering.reached
            )
            covering.reached = self.ghost.reached
            return
        covered = covering.covered
        sites = [s for s in graph.sites if not covered.isdisjoint(s.call.parameters.values())]
        ghost = ghost_gradients(self.losses, sites, seed, retain_graph=True)
        if len(sites) == len(graph.sites):
            covering.reached = ghost.reached
        if check:
            self._check(covering, sites, ghost)
        sparse = {
            p for s in sites if s.call.needs_autograd_combine for p in s.call.parameters.values()
        }
        self.rest = [p for p in self.leaves if p not in covered]
        self.finished_by_autograd = [p for p in self.leaves if p not in covered or p in sparse]
        self.ghost = ghost.restricted_to(covered)

    def rows(self, parameters: Callable[[Tensor], bool]) -> PerSampleGradients:
        """G with the columns of the chosen parameters."""
        if self.ghost is not None and not self.rest and all(map(parameters, self.leaves)):
            return self.ghost
        parts: list[PerSampleGradients] = []
        chosen = {p for p in self.leaves if parameters(p)}
        rest = [p for p in self.rest if p in chosen]
        if self.ghost is not None:
            part = self.ghost.restricted_to(chosen)
            if part.calls:
                parts.append(part)
        if rest:
            parts.append(AutodiffGradients(self.losses, rest, self.engine.known, self.pull_back))
        if not parts:
            raise RuntimeError(
                "the losses do not depend on any parameter that makes the scores: expected losses "
                "computed from the model under torch.enable_grad(), and score_parameters among "
                "the trainable parameters"
            )
        return parts[0] if len(parts) == 1 else StackedGradients(parts)

    def weighted_sum(self, weights: Tensor, keep_graph: bool) -> dict[Tensor, Tensor]:
        """Sum of w_i times the gradient of loss i, for every leaf of the model that has one.

        This may be the last use: layers that only autograd can finish, and uncovered leaves, take
        one more backward pass.
        """
        total: dict[Tensor, Tensor] = {}
        rest = self.finished_by_autograd
        last = not keep_graph and not self.sharing
        if self.ghost is not None and not rest:
            ghost = self.ghost
            if last:
                self._let_go()
            total = ghost.combine(weights, release=last)
        elif self.ghost is not None:
            total = self.ghost.restricted_to(set(self.leaves).difference(rest)).combine(weights)
        if rest:
            if self.heard:
                gradients = self.pull_back(rest, weights)
            else:
                gradients = backward_to(rest, self.losses, weights, retain_graph=not last)
            total.update((p, g) for p, g in zip(rest, gradients, strict=True) if g is not None)
        return {p: g.to(p.dtype) for p, g in total.items()}

    def plain_sum(
        self, leaves: Sequence[Tensor], factors: Tensor, *, heard: bool
    ) -> dict[Tensor, Tensor]:
        """Sum of factor_i times the gradient of loss i, by ordinary autograd, for any leaves.

        Args:
            leaves: of the graph.
            factors: (B,).
            heard: whether hooks on activations hear another pass of this loss.
        """
        by = self.pull_back if heard else self._heard
        gradients = by(leaves, factors)
        return {p: g for p, g in zip(leaves, gradients, strict=True) if g is not None}

    def is_wanted(self, leaf: Tensor) -> bool:
        """Whether the backward pass that runs now asks for the gradient of a leaf."""
        return is_wanted(self.node_of[leaf])

    def pull_back(
        self, leaves: Sequence[Tensor], weights: Tensor, create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        """A backward pass that no hook hears, unless one of them changes the gradient."""
        if self.engine.known.get(HOOKS_CHANGE):
            return self._heard(leaves, weights, create_graph)
        edges = [GradientEdge(self.node_of[leaf], 0) for leaf in leaves]
        return self._pull(weights, edges, create_graph)

    def close(self) -> None:
        """The backward pass is over: nothing of it may be held any longer."""
        self.engine.left(self)
        for other in self.sharing:
            other.sharing.discard(self)
        if not self.sharing:
            self._let_go()
        self.ghost = None
        self.losses = self.losses.detach()
        self.graph = Graph.empty()
        self.node_of = {}

    def _pull(
        self, weights: Tensor, edges: Sequence[GradientEdge], create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        cotangent = weights.to(self.losses.dtype)
        return pull_back(self.losses, cotangent, edges, self.graph.order, create_graph=create_graph)

    def _heard(
        self, leaves: Sequence[Tensor], weights: Tensor, create_graph: bool = False
    ) -> Sequence[Tensor | None]:
        return backward_to(
            leaves, self.losses, weights, retain_graph=True, create_graph=create_graph
        )

    def _check(self, covering: Covering, sites: list[CallSite], ghost: GhostGradients) -> None:
        """Compare the products with autograd; what is wrong is left to it."""
        parameters = [p for p in self.leaves if p in covering.covered]
        probe = probe_of(self.losses, self.engine.random)
        wrong = compare(parameters, self.pull_back(parameters, probe), probe, ghost)
        if wrong and not self.engine.known.get(HOOKS_CHANGE):
            # What the layers heard, the hooks may have changed on the way.
            again = compare(parameters, self._heard(parameters, probe), probe, ghost)
            if not again:
                self._hooks_change_gradients()
            wrong = again
        if in_half_precision(ghost):
            # Autograd's sums over many samples are too rough there to tell; our own are not.
            one = torch.ones((), device=probe.device)
            rows = ghost_gradients(
                self.losses, sites, one, retain_graph=True, backward=partial(self._pull, probe)
            )
            sums = rows.combine(torch.ones_like(probe))
            wrong = {p: error for p, error in wrong.items() if p not in covering.alone}
            wrong |= compare(parameters, [sums.get(p) for p in parameters], probe, ghost)
        if wrong:
            self.engine.reject(covering, wrong)
        else:
            covering.agree()

    def _compare_unheard(self, seed: Tensor) -> None:
        if self.engine.known.get(HOOKS_CHANGE) or not self.leaves:
            return
        factors = seed.to(self.losses.dtype).expand_as(self.losses)
        heard = self._heard(self.leaves, factors)
        self.heard = True
        if not equal(heard, self.pull_back(self.leaves, factors)):
            self._hooks_change_gradients()

    def _hooks_change_gradients(self) -> None:
        self.engine.known[HOOKS_CHANGE] = True
        logger.info(
            "a hook on an activation changes the gradient: it is called in every backward pass "
            "that the weights need, so that all of them see the same model"
        )

    def _let_go(self) -> None:
        """Hold the layers' inputs and output gradients no longer, here and on the graph."""
        self.graph.forget_calls()
        self.graph = Graph.empty()
        self.ghost = None


def is_wanted(leaf: Node) -> bool:
    """Whether the backward pass that runs now asks for the gradient that a node accumulates."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch's answer for a leaf that `autograd.grad` was asked for
        return True
