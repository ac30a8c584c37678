"""Directions go forwards through the graph that a forward pass has left.

A node of autograd's graph pulls gradients back: from its outputs to its inputs. With what it saved
for that, a change of its inputs can be pushed forward as well, to the change of its outputs:

    pull back       u    ->  J^T u       what the node does when it is called
    push forward    t    ->  J t         this module

So the derivative of all losses along one direction costs about a forward pass, through BatchNorm's
batch statistics, dropout masks and random choices as they were: nothing of the model is run again.

Most operations need no formula. Where J is symmetric (elementwise functions, softmax, the
statistics of a normalisation), the node itself is its own push. Where nothing is known, J is the
transpose of what the node does, which is linear: the derivative of a pull by u, along t.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from irw_optim.gradients.forward import (
    FORWARD,
    ForwardRule,
    Tangents,
    diagonal,
    of_single_losses,
    transposed,
)
from irw_optim.gradients.mixing_rules import elementwise, handed_on, unreduced
from irw_optim.gradients.nodes import Rule, base_name
from irw_optim.gradients.operations import RULES, rule_for

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
    """The change of one output for changes of leaves; None where none arrives.

    Args:
        order: the nodes that lead to it, each before those it reads from.
        leaves: the change of each leaf, by the node that accumulates its gradient.
        wanted: where the change is asked for.

    Raises:
        NoPushForwardError: a change arrives at an operation that cannot push it.
    """
    read = {node: [_place(*edge) for edge in node.next_functions] for node in order}
    readers = Counter(place for places in read.values() for place in places)
    readers[wanted] += 1
    changed: dict[Place | None, Tensor] = {(node, 0): t for node, t in leaves.items()}
    with torch.no_grad():
        for node in reversed(order):
            tangents = [changed.get(place) for place in read[node]]
            for place in read[node]:
                readers[place] -= 1
                if not readers[place]:
                    changed.pop(place, None)
            if all(t is None for t in tangents):
                continue
            for number, change in enumerate(push(node, tangents)):
                if change is not None and readers[node, number]:
                    changed[node, number] = change
    return changed.get(wanted)


def _place(node: Node | None, output: int) -> Place | None:
    return None if node is None else (node, output)


def _is_complex(tangents: Tangents, outputs: Sequence[Any]) -> bool:
    for tangent in tangents:
        if tangent is not None and tangent.is_complex():
            return True
    for output in outputs:  # noqa: SIM110 (a generator takes as long as an operation)
        if output.dtype.is_complex:
            return True
    return False
