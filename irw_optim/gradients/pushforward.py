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

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.forward import (
    FORWARD,
    ForwardRule,
    Tangents,
    diagonal,
    of_single_losses,
    transposed,
)
from irw_optim.gradients.mixing import rule_for
from irw_optim.gradients.mixing_rules import RULES, elementwise, handed_on, unreduced
from irw_optim.gradients.nodes import Rule, base_name, pull

Place: TypeAlias = tuple[Node, int]
"""A node, and the number of one of its outputs."""

_OF_KIND: dict[Rule | None, ForwardRule] = {elementwise: diagonal, unreduced: of_single_losses}


class NoPushForwardError(RuntimeError):
    """An operation whose derivative can only be pulled back."""


def push(node: Node, tangents: Tangents) -> Tangents:
    """The changes of a node's outputs for changes of its inputs; of the first, if no other.

    Raises:
        NoPushForwardError: the operation has no rule, and no double backward.
    """
    try:
        return _pushed(node, tangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no double backward; sparse or nested numbers
        reason = str(error).partition("\n")[0]
        raise NoPushForwardError(f"{node.name()}: {reason}") from error


def _pushed(node: Any, tangents: Tangents) -> Tangents:
    if rule_for(node) is handed_on:
        return tangents
    outputs = node._input_metadata
    rule = None if _is_complex(tangents, outputs) else _rule_of(node)
    try:
        changes = None if rule is None else rule(node, tangents)
    except AttributeError:  # another version of torch saves it under another name
        changes = None
    if changes is None:
        changes = transposed(node, tangents)
    if isinstance(changes, Tensor):
        return [_fitted(changes, outputs[0])]
    return [None if c is None else _fitted(c, m) for c, m in zip(changes, outputs, strict=True)]


def _fitted(change: Tensor, output: Any) -> Tensor:
    dtype, shape = output.dtype, tuple(output.shape)
    if change.dtype != dtype:
        change = change.to(dtype)
    return change if change.shape == shape else change.expand(shape)


def _rule_of(node: Node) -> ForwardRule | None:
    name = base_name(node)
    if name in FORWARD:
        return FORWARD[name]
    return _OF_KIND.get(RULES.get(name))


def push_through(
    order: Sequence[Node], leaves: Mapping[Node, Tensor], wanted: Place
) -> Tensor | None:
    """The change of one output for changes of leaves, given for their nodes; None for none.

    The order is that of the nodes that lead to it, each before those it reads from.

    Raises:
        NoPushForwardError: a change arrives at an operation that cannot push it.
    """
    read = [node.next_functions for node in order]
    readers = Counter(chain.from_iterable(read))
    readers[wanted] += 1
    changed: dict[Any, Tensor] = {(node, 0): t for node, t in leaves.items()}
    with torch.no_grad():
        for node, places in zip(reversed(order), reversed(read), strict=True):
            tangents = [changed.get(place) for place in places]
            arrives = False
            for place, tangent in zip(places, tangents, strict=True):
                if tangent is not None:
                    arrives = True
                    readers[place] -= 1
                    if not readers[place]:
                        del changed[place]
            if not arrives:
                continue
            for number, change in enumerate(push(node, tangents)):
                if change is not None and readers[node, number]:
                    changed[node, number] = change
    return changed.get(wanted)


def _is_complex(tangents: Tangents, outputs: Sequence[Any]) -> bool:
    for tangent in tangents:
        if tangent is not None and tangent.is_complex():
            return True
    for output in outputs:  # noqa: SIM110 (a generator takes as long as an operation)
        if output.dtype.is_complex:
            return True
    return False


def pull_back(
    losses: Tensor, cotangent: Tensor, edges: Sequence[GradientEdge], order: Sequence[Node]
) -> list[Tensor | None]:
    """The gradient of ``<cotangent, losses>``, both (B,), at edges of the graph, where it arrives.

    The order is that of the nodes that lead to the losses, each before those it reads from.
    """
    found: list[Tensor | None] = [None] * len(edges)
    if losses.grad_fn is None:
        return found
    wanted: dict[Node, list[tuple[int, int]]] = {}
    for number, edge in enumerate(edges):
        wanted.setdefault(edge.node, []).append((edge.output_nr, number))
    # What is neither wanted nor leads to anything wanted need not be run.
    leading: set[Node] = set()
    for node in reversed(order):
        for parent, _ in node.next_functions:
            if parent in wanted or parent in leading:
                leading.add(node)
                break
    met = leading | wanted.keys()
    arrived: dict[Node, list[Tensor | None]] = {}

    def arrive(node: Node, output: int, gradient: Tensor) -> None:
        outputs: Any = node._input_metadata
        metadata = outputs[output]
        if gradient.shape != tuple(metadata.shape):
            gradient = gradient.sum_to_size(metadata.shape)
        if gradient.dtype != metadata.dtype:
            if gradient.is_complex() and not metadata.dtype.is_complex:
                gradient = gradient.real
            gradient = gradient.to(metadata.dtype)
        here = arrived.get(node)
        if here is None:
            here = arrived[node] = [None] * len(outputs)
        before = here[output]
        here[output] = gradient if before is None else before + gradient

    def run() -> None:
        with torch.no_grad():
            if root in met:
                arrive(root, losses.output_nr, cotangent)
            for node in (*order, *wanted):  # leaves are in no order
                gradients = arrived.pop(node, None)
                if gradients is None:
                    continue
                for output, number in wanted.get(node, ()):
                    found[number] = gradients[output]
                if node in leading:
                    results = pull(node, gradients)
                    for (parent, output), part in zip(node.next_functions, results, strict=True):
                        if part is not None and parent in met:
                            arrive(parent, output, part)

    root = losses.grad_fn
    in_a_pass(losses, edges, run)
    return found


def push_forward(losses: Tensor, direction: Mapping[Node, Tensor], order: Sequence[Node]) -> Tensor:
    """How much every loss changes along a direction, given for the leaves' nodes: (B,).

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

    So nodes know which inputs are needed, and what is recomputed (checkpointing) is of one pass.
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
