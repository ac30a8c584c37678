"""Backward passes from one vector of losses: one that hooks on activations hear, others that not.

Hooks are there for the pass of the training loop, and hear one from us: that of the ordinary mean,
which gives the layers their output gradients; or, where autograd finishes some parameters, the last
one, with the weighted gradient. A hook may also change the gradient that it hears (a reversal, a
clipping). Then every pass has to be heard, and which it is, is found out by comparing two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from irw_optim.gradients.graph import Graph
from irw_optim.gradients.protocol import Direction
from irw_optim.gradients.pushforward import NoPushForwardError, pull_back, push_forward
from irw_optim.gradients.silence import silent
from irw_optim.gradients.verification import equal

logger = logging.getLogger("irw_optim")

HOOKS_CHANGE = "hooks change gradients"
"""What an `Engine` remembers of its model: passes that no hook hears give something else."""


class BackwardPasses:
    """From the losses to edges of their graph.

    Args:
        losses: (B,), with their graph.
        graph: what leads to them.
        known: what is remembered of the model.
        one_forward: around each pass.

    Attributes:
        hooks_ran: whether hooks have heard a pass of these losses.
    """

    def __init__(
        self,
        losses: Tensor,
        graph: Graph,
        known: dict[str, bool],
        one_forward: AbstractContextManager[None],
    ) -> None:
        self.losses = losses
        self.graph = graph
        self.known = known
        self.one_forward = one_forward
        self.hooks_ran = False

    @cached_property
    def _edges(self) -> dict[Tensor, GradientEdge]:
        graph = self.graph
        return {
            leaf: GradientEdge(node, 0)
            for leaf, node in zip(graph.leaves, graph.leaf_nodes, strict=True)
        }

    def edges_of(self, leaves: Sequence[Tensor]) -> list[GradientEdge]:
        """Where the gradients of leaves arrive."""
        return [self._edges[leaf] for leaf in leaves]

    def without_hooks(
        self, edges: Sequence[GradientEdge], weights: Tensor
    ) -> Sequence[Tensor | None]:
        """The gradient of <weights, losses> at some edges; hooks run where they change it."""
        if self.known.get(HOOKS_CHANGE):
            return self.with_hooks(edges, weights)
        with self.one_forward:
            return pull_back(self.losses, weights.to(self.losses.dtype), edges, self.graph.order)

    def push(self, direction: Direction) -> Tensor:
        """How much every loss changes along a direction of the leaves: (B,).

        Raises:
            NoPushForwardError: an operation on the way can only be pulled back; or hooks change
                gradients, of which the graph itself does not know.
        """
        if self.known.get(HOOKS_CHANGE):
            raise NoPushForwardError("hooks on activations have a say in it")
        changes = {
            self._edges[leaf].node: change.to(leaf.dtype)
            for leaf, change in direction.items()
            if leaf in self._edges
        }
        with self.one_forward:
            return push_forward(self.losses, changes, self.graph.order)

    def with_hooks(
        self,
        edges: Sequence[GradientEdge],
        weights: Tensor,
        *,
        retain_graph: bool = True,
    ) -> Sequence[Tensor | None]:
        """The same by autograd's own engine; hooks of leaves wait for the gradient that counts."""
        self.hooks_ran = True
        with self.one_forward, silent(self.graph.leaves), torch.enable_grad():
            return torch.autograd.grad(
                self.losses,
                edges,
                weights.to(self.losses.dtype),
                retain_graph=retain_graph,
                allow_unused=True,
            )

    def compare_hooks(
        self, edges: Sequence[GradientEdge], weights: Tensor, leaves: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """A pass that is heard, compared with one that is not, as they arrive at the leaves."""
        ends = self.edges_of(leaves)
        found = self.with_hooks([*edges, *ends], weights)
        known = self.known.get(HOOKS_CHANGE)
        if not known and not equal(leaves, found[len(edges) :], self.without_hooks(ends, weights)):
            self.known[HOOKS_CHANGE] = True
            logger.info(
                "a hook on an activation changes the gradient: it is called in every backward pass "
                "that the weights need, so that all of them see the same model"
            )
        return found[: len(edges)]
