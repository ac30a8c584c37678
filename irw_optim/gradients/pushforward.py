"""Passes of our own through the graph that a forward pass has left: directions forwards, or back.

A node of autograd's graph pulls gradients back: from its outputs to its inputs. With what it saved
for that, a change of its inputs can be pushed forward as well, to the change of its outputs:

    pull back       u    ->  J^T u       what the node does when it is called
    push forward    t    ->  J t         here, and in `forward`

So the derivative of all losses along one direction costs about a forward pass, through BatchNorm's
batch statistics, dropout masks and random choices as they were: nothing of the model is run again.

No hook hears such a pass: hooks belong to the one that the training loop asked for. They are
called by autograd's engine, around every node; here the nodes are called one after the other,
consumers first. Nothing is freed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.forward import Tangents, transposed
from irw_optim.gradients.graph import Graph, gradients_at
from irw_optim.gradients.places import NOTHING, Operation, Places, Pull, number_at, places_of


class NoPushForwardError(RuntimeError):
    """An operation whose derivative can only be pulled back."""


def push(node: Node, operation: Operation, tangents: Tangents) -> Tangents:
    """The changes of a node's outputs for changes of its inputs; of the first, if no other.

    Raises:
        NoPushForwardError: the operation has no rule, and no double backward.
    """
    if operation.hands_on:
        return tangents
    try:
        try:
            changes = None if operation.rule is None else operation.rule(node, tangents)
        except AttributeError:  # another version of torch saves it under another name
            changes = None
        if changes is None:
            changes = transposed(node, tangents)
        if isinstance(changes, Tensor):
            changes = [changes]
        for number, change in enumerate(changes):
            if change is None:
                continue
            dtype, shape = operation.dtypes[number], operation.shapes[number]
            if change.dtype != dtype or change.shape != shape:
                changes = list(changes)
                changes[number] = change.to(dtype).expand(shape)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no double backward; sparse or nested numbers
        reason = str(error).partition("\n")[0]
        raise NoPushForwardError(f"{node.name()}: {reason}") from error
    return changes


def push_through(
    order: Sequence[Node], output: int, places: Places, leaves: Mapping[int, Tensor]
) -> Tensor | None:
    """The change of an output of the first node for changes of leaves, by their numbers; or None.

    The order is that of the nodes that lead to it, each before those it reads from.

    Raises:
        NoPushForwardError: a change arrives at an operation that cannot push it.
    """
    changed: list[Tensor | None] = [None] * (places.count + 1)  # the last for `NOTHING`
    for number, change in leaves.items():
        changed[places.leaves[number]] = change
    with torch.no_grad():
        for place, operation, dying, writes in places.way_forward:
            tangents = [changed[n] for n in operation.reads]
            for n in dying:
                changed[n] = None
            for tangent in tangents:
                if tangent is not None:
                    break
            else:
                continue
            changes = push(order[place], operation, tangents)
            for number, n in writes:
                if number < len(changes):
                    changed[n] = changes[number]
    return changed[places.first[0] + output]


def pull_back(
    losses: Tensor, cotangent: Tensor, edges: Sequence[GradientEdge], graph: Graph
) -> list[Tensor | None]:
    """The gradient of ``<cotangent, losses>``, both (B,), at edges of their graph; or None."""
    order, places = graph.order, places_of(graph)
    if losses.grad_fn is None:
        return [None] * len(edges)
    wanted = [number_at(edge, graph) for edge in edges]
    way = places.way_back(frozenset(wanted))
    arrived: list[Tensor | None] = [None] * (places.count + 1)

    def run() -> None:
        arrived[places.first[0] + losses.output_nr] = cotangent
        pull_along(way, order, places, arrived)

    in_a_pass(losses, edges, run)
    return [None if n == NOTHING else arrived[n] for n in wanted]


def pull_along(
    way: Sequence[Pull], order: Sequence[Node], places: Places, arrived: list[Tensor | None]
) -> None:
    """Let what has arrived go on to what was read, and let it go where nobody wants it."""
    shapes, dtypes = places.shapes, places.dtypes
    with torch.no_grad():
        for place, operation, reads, stays in way:
            makes = operation.makes
            gradients = arrived[makes]
            for gradient in gradients:
                if gradient is not None:
                    break
            else:
                if not operation.fills_in:
                    continue
            if not stays:
                arrived[makes] = [None] * len(gradients)
            for n, part in zip(reads, operation.pull(order[place], gradients), strict=True):
                if n == NOTHING or part is None:
                    continue
                if part.shape != shapes[n] or part.dtype != dtypes[n]:
                    part = _fitted(part, shapes[n], dtypes[n])
                before = arrived[n]
                arrived[n] = part if before is None else before + part


def _fitted(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Of the shape and type of what it is the gradient of."""
    if gradient.shape != shape:
        gradient = gradient.sum_to_size(shape)
    if gradient.is_complex() and not dtype.is_complex:
        gradient = gradient.real
    return gradient.to(dtype)


def push_forward(losses: Tensor, direction: Mapping[int, Tensor], graph: Graph) -> Tensor:
    """How much every loss changes along a direction, given by the leaves' numbers: (B,).

    Raises:
        NoPushForwardError: an operation on the way can only be pulled back.
    """
    if not direction or losses.grad_fn is None:
        return torch.zeros_like(losses)
    found: list[Tensor | None] = []

    def run() -> None:
        found.append(push_through(graph.order, losses.output_nr, places_of(graph), direction))

    in_a_pass(losses, [GradientEdge(graph.leaf_nodes[n], 0) for n in direction], run)
    return torch.zeros_like(losses) if found[0] is None else found[0]


def in_a_pass(losses: Tensor, edges: Sequence[GradientEdge], run: Callable[[], None]) -> None:
    """Run something as if in a backward pass of autograd's engine from the losses to some edges.

    So nodes know which inputs are needed, and what is recomputed (checkpointing) is of one pass.
    """
    with torch.enable_grad():
        above: Tensor = _Above.apply(losses, run)  # type: ignore[no-untyped-call]
        with suppress(_FinishedError), _without_anomaly_detection():
            gradients_at(above, edges, losses, retain_graph=True)


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
