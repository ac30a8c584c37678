"""Backward passes from one vector of losses: one that hooks on activations hear, others that not.

Hooks hear that of the mean, to the layers' outputs; or, where autograd finishes some parameters,
the weighted one. A hook that changes what it hears (a reversal, a clipping) has to hear every pass,
which comparing two finds out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.coverage import equal
from irw_optim.gradients.graph import Graph, gradients_at
from irw_optim.gradients.mixing import is_foreign
from irw_optim.gradients.places import places_of
from irw_optim.gradients.protocol import Direction
from irw_optim.gradients.pushforward import NoPushForwardError, pull_back, push_forward
from irw_optim.gradients.recomputation import NOTHING
from irw_optim.torch_internals import silent

End: TypeAlias = Tensor | GradientEdge
"""A leaf, or an edge of the graph."""

logger = logging.getLogger("irw_optim")

HOOKS_CHANGE = "hooks change gradients"


class BackwardPasses:
    """From the losses to edges of their graph, each in ``one_forward``."""

    def __init__(
        self,
        losses: Tensor,
        graph: Graph,
        known: dict[str, bool],
        one_forward: AbstractContextManager[object] = NOTHING,
        model: nn.Module | None = None,
    ) -> None:
        self.losses = losses
        self.graph = graph
        self.known = known
        self.one_forward = one_forward
        self.model = model
        self.hooks_ran = False  # whether they have heard a pass of these losses

    @property
    def may_share_memory(self) -> bool:
        """Whether a pass may write where the last did, as CUDA graphs do."""
        return not self.losses.is_cpu or places_of(self.graph).in_python

    def without_hooks(self, ends: Sequence[End], weights: Tensor) -> Sequence[Tensor | None]:
        """The gradient of <weights, losses>, (B,) both; hooks run where they change it."""
        if self.known.get(HOOKS_CHANGE):
            return self.with_hooks(ends, weights)
        cotangent, edges = weights.to(self.losses.dtype), self.graph.edges
        found: list[Any] = [edges.get(end, end) for end in ends]
        with self.one_forward:
            return pull_back(self.losses, cotangent, found, self.graph)

    def push(self, direction: Direction) -> Tensor:
        if self.known.get(HOOKS_CHANGE):
            raise NoPushForwardError("hooks on activations have a say in it")
        numbers = {p: n for n, p in enumerate(self.graph.leaves)}
        changes = {numbers[p]: v.to(p.dtype) for p, v in direction.items() if p in numbers}
        unit: Tensor | float = 1.0
        if changes and torch.float16 in places_of(self.graph).dtypes:  # up to 65504
            sizes = [change.abs().max().float() for change in changes.values() if change.numel()]
            unit = torch.stack(sizes).max().clamp(min=1e-30)
            changes = {n: change / unit for n, change in changes.items()}
        with self.one_forward:
            return push_forward(self.losses, changes, self.graph) * unit

    def with_hooks(
        self, ends: Sequence[End], weights: Tensor, *, retain_graph: bool = True
    ) -> Sequence[Tensor | None]:
        """The same by autograd's own engine."""
        self.hooks_ran = True
        graph = self.graph
        found = [graph.edges.get(end, end) for end in ends]
        with self.one_forward:
            return backward_to(found, self.losses, weights, graph.leaves, retain_graph=retain_graph)

    def compare_hooks(
        self, edges: Sequence[End], weights: Tensor, leaves: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """One that is heard, compared at the leaves with one that is not."""
        with _nothing_added(self.model, self.graph.order):
            found = self.with_hooks([*edges, *leaves], weights)
        known = self.known.get(HOOKS_CHANGE)
        if not known and not equal(
            leaves, found[len(edges) :], self.without_hooks(leaves, weights)
        ):
            self.known[HOOKS_CHANGE] = True
            logger.info(
                "a hook on an activation changes the gradient: it is called in every backward pass "
                "that the weights need"
            )
        return found[: len(edges)]


@contextmanager
def _nothing_added(model: nn.Module | None, nodes: Iterable[Node]) -> Iterator[None]:
    """Raise where a function in Python writes to ``p.grad``, as reversible blocks do."""
    foreign = {node.name() for node in nodes if is_foreign(node)}
    parameters = [] if model is None or not foreign else [*model.parameters()]
    before = _gradients_of(parameters)
    yield
    after = _gradients_of(parameters)
    if any(a is not b or v != w for (a, v), (b, w) in zip(before, after, strict=True)):
        for p, (gradient, _) in zip(parameters, before, strict=True):
            p.grad = gradient
        raise RuntimeError(
            f"{', '.join(sorted(foreign))}: its backward calls backward() on a part of the model, "
            "which adds to p.grad: no gradient of single samples can be had. Turn it off "
            "(reversible layers often have an option), take torch.utils.checkpoint with "
            "use_reentrant=False, or have it return what torch.autograd.grad computes"
        )


def _gradients_of(parameters: Iterable[Tensor]) -> list[tuple[Tensor | None, int | None]]:
    return [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]


def backward_to(
    ends: Any,
    losses: Tensor,
    weights: Tensor,
    leaves: Iterable[Tensor],
    *,
    retain_graph: bool,
) -> Sequence[Tensor | None]:
    """Autograd's own pass, unheard by the leaves, whose hooks belong to the final one."""
    with silent(leaves), torch.enable_grad():
        return gradients_at([losses], ends, [weights.to(losses.dtype)], retain_graph=retain_graph)


def edges_aside(graph: Graph, rest: Sequence[Tensor]) -> list[GradientEdge]:
    """Layers off the way to the rest, whose hooks hear the pass, too."""
    if not graph.sites:
        return []
    on_the_way = {graph.edges[leaf].node for leaf in rest}
    for node in reversed(graph.order):
        if any(parent in on_the_way for parent, _ in node.next_functions):
            on_the_way.add(node)
    return [site.edge for site in graph.sites if site.edge.node not in on_the_way]
