"""Backward passes of our own, which no hook hears.

A hook on a parameter or on an activation belongs to the one pass that the training loop asked for.
Scores and comparisons need further passes through the same graph, in which it would be called
besides, with another gradient. Autograd's engine calls hooks around every node; the nodes
themselves are functions. Here they are called one after the other, consumers first, as it would::

    gradient of a node's output  ->  node(gradient)  ->  gradients of its inputs, summed up where
                                                         several nodes read the same

Nothing is freed on the way: the graph is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.nodes import pull
from irw_optim.gradients.pushforward import push_through


def pull_back(
    losses: Tensor, cotangent: Tensor, edges: Sequence[GradientEdge], order: Sequence[Node]
) -> list[Tensor | None]:
    """The gradient of ``<cotangent, losses>`` at some edges of the graph.

    Args:
        losses: (B,), with their graph.
        cotangent: (B,).
        edges: where gradients are wanted: outputs of nodes, or leaves by their accumulating nodes.
        order: the nodes that lead to the losses, each before those it reads from.

    Returns:
        One tensor for each edge; None where no gradient arrives.
    """
    if losses.grad_fn is None:
        return [None] * len(edges)
    pass_ = _Pass(edges, order)
    root = GradientEdge(losses.grad_fn, losses.output_nr)
    in_a_pass(losses, edges, partial(pass_.run, root, cotangent))
    return pass_.found


def push_forward(losses: Tensor, direction: Mapping[Node, Tensor], order: Sequence[Node]) -> Tensor:
    """How much every loss changes along a direction, (B,).

    Args:
        losses: (B,), with their graph.
        direction: the change of each leaf, by the node that accumulates its gradient.
        order: the nodes that lead to the losses, each before those it reads from.

    Raises:
        NoPushForwardError: an operation on the way can only be pulled back.
    """
    if not direction or losses.grad_fn is None:
        return torch.zeros_like(losses)
    end = (losses.grad_fn, losses.output_nr)
    found: list[Tensor | None] = []

    def run() -> None:
        with torch.no_grad():
            found.append(push_through(order, direction, end))

    in_a_pass(losses, [GradientEdge(leaf, 0) for leaf in direction], run)
    return torch.zeros_like(losses) if found[0] is None else found[0]


def in_a_pass(losses: Tensor, edges: Sequence[GradientEdge], run: Callable[[], None]) -> None:
    """Run something as if in a backward pass of autograd's engine from the losses to some edges.

    So nodes know which of their inputs are needed, and what is recomputed (checkpointing) belongs
    to one pass.
    """
    with torch.enable_grad():
        above: Tensor = _Above.apply(losses, run)  # type: ignore[no-untyped-call]
        with suppress(_FinishedError), _without_anomaly_detection():
            torch.autograd.grad(above, edges, losses, retain_graph=True, allow_unused=True)


def _without_anomaly_detection() -> AbstractContextManager[object]:
    """It would report how such a pass ends."""
    if torch.is_anomaly_enabled():
        return torch.autograd.set_detect_anomaly(False)
    return nullcontext()


class _FinishedError(Exception):
    """Ends a pass of the engine's before it calls the first node."""


class _Above(torch.autograd.Function):
    """A node above the losses, in whose place a pass of ours runs."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        ctx.run()
        raise _FinishedError


class _Pass:
    """One pass: what is wanted, what has arrived where."""

    def __init__(self, edges: Sequence[GradientEdge], order: Sequence[Node]) -> None:
        self.found: list[Tensor | None] = [None] * len(edges)
        self.wanted: dict[Node, list[tuple[int, int]]] = {}
        for number, edge in enumerate(edges):
            self.wanted.setdefault(edge.node, []).append((edge.output_nr, number))
        self.order = order
        self.arrived: dict[Node, list[Tensor | None]] = {}
        # What is neither wanted nor leads to anything wanted need not be run.
        self.leading: set[Node] = set()
        for node in reversed(order):
            if any(p in self.wanted or p in self.leading for p, _ in node.next_functions):
                self.leading.add(node)

    def run(self, root: GradientEdge, cotangent: Tensor) -> None:
        with torch.no_grad():
            self._arrive(root.node, root.output_nr, cotangent)
            for node in self.order:
                gradients = self.arrived.pop(node, None)
                if gradients is None:
                    continue
                self._take(node, gradients)
                if node in self.leading:
                    results = pull(node, gradients)
                    for (parent, output), gradient in zip(
                        node.next_functions, results, strict=True
                    ):
                        if parent is not None and gradient is not None:
                            self._arrive(parent, output, gradient)
            for node in list(self.arrived):  # leaves
                self._take(node, self.arrived.pop(node))

    def _arrive(self, node: Node, output: int, gradient: Tensor) -> None:
        if node not in self.leading and node not in self.wanted:
            return
        metadata: Any = node._input_metadata[output]
        if gradient.shape != metadata.shape:
            gradient = gradient.sum_to_size(metadata.shape)
        if gradient.dtype != metadata.dtype:
            if gradient.is_complex() and not metadata.dtype.is_complex:
                gradient = gradient.real
            gradient = gradient.to(metadata.dtype)
        here = self.arrived.setdefault(node, [None] * len(node._input_metadata))
        before = here[output]
        here[output] = gradient if before is None else before + gradient

    def _take(self, node: Node, gradients: list[Tensor | None]) -> None:
        for output, number in self.wanted.get(node, ()):
            self.found[number] = gradients[output]
