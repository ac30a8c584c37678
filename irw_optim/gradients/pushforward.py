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
from itertools import zip_longest
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
)
from irw_optim.gradients.mixing_rules import elementwise, unreduced
from irw_optim.gradients.nodes import base_name, pull
from irw_optim.gradients.operations import RULES
from irw_optim.gradients.place import Rule

Place: TypeAlias = tuple[Node, int]
"""A node, and the number of one of its outputs."""


_OF_KIND: dict[Rule | None, ForwardRule] = {elementwise: diagonal, unreduced: of_single_losses}


class NoPushForwardError(RuntimeError):
    """An operation whose derivative can only be pulled back."""


def push(node: Node, tangents: Tangents) -> Tangents:
    """The changes of a node's outputs for changes of its inputs.

    Args:
        node: of a graph that is still held.
        tangents: for each of ``node.next_functions``; not None for all.

    Raises:
        NoPushForwardError: the operation has no rule, and no double backward.
    """
    rule = None if _is_complex(node, tangents) else _rule_of(node)
    try:
        changes = None if rule is None else rule(node, tangents)
    except AttributeError:  # another version of torch saves it under another name
        changes = None
    if changes is None:
        changes = _transposed(node, tangents)
    outputs: Any = node._input_metadata
    found = [changes] if isinstance(changes, Tensor) else changes
    return [
        None if change is None else change.to(output.dtype).expand(output.shape)
        for change, output in zip_longest(found, outputs)
    ]


def _rule_of(node: Node) -> ForwardRule | None:
    name = base_name(node)
    if name in FORWARD:
        return FORWARD[name]
    return _OF_KIND.get(RULES.get(name))


def push_through(
    order: Sequence[Node], leaves: Mapping[Node, Tensor], wanted: Place
) -> Tensor | None:
    """The change of one output for changes of leaves.

    Args:
        order: the nodes that lead to it, each before those it reads from.
        leaves: the change of each leaf, by the node that accumulates its gradient.
        wanted: where the change is asked for.

    Returns:
        None where no change arrives.

    Raises:
        NoPushForwardError: a change arrives at an operation that cannot push it.
    """
    read = {node: [_place(*edge) for edge in node.next_functions] for node in order}
    readers = Counter(place for places in read.values() for place in places)
    readers[wanted] += 1
    changed: dict[Place | None, Tensor] = {(node, 0): t for node, t in leaves.items()}
    for node in reversed(order):
        tangents = [changed.get(place) for place in read[node]]
        readers.subtract(read[node])
        for place in read[node]:
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


def _transposed(node: Any, tangents: Tangents) -> Tangents:
    """J t as the derivative of u -> J^T u, which is linear: any u does."""
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    with torch.enable_grad():
        seeds = [
            torch.full(m.shape, _seed(node), dtype=m.dtype, device=m.device, requires_grad=True)
            for m in node._input_metadata
        ]
        try:
            pulled = pull(node, seeds)
            answers, directions = [], []
            for number, tangent in changing:
                gradient = _of_seeds(pulled[number], node)
                if gradient is not None:
                    answers.append(gradient)
                    directions.append(tangent.to(gradient.dtype).expand(gradient.shape))
            if not answers:
                return [torch.zeros_like(seed) for seed in seeds]
            found = torch.autograd.grad(answers, seeds, directions, allow_unused=True)
            return [None if change is None else change.detach() for change in found]
        except RuntimeError as error:
            if isinstance(error, NoPushForwardError) or not _lacks_double_backward(error):
                raise
            raise NoPushForwardError(str(error).splitlines()[0]) from error


def _seed(node: Node) -> float:
    return 1.0 if base_name(node) == "Logcumsumexp" else 0.0  # whose backward takes a logarithm


def _of_seeds(gradient: Tensor | None, node: Node) -> Tensor | None:
    """A gradient, if it was made of what the node was given; if not, it had better be zero."""
    if gradient is not None and gradient.requires_grad:
        return gradient
    if base_name(node) in ("", "CopySlices") or (gradient is not None and gradient.any()):
        raise NoPushForwardError(
            f"{node.name()} does not say how its gradient depends on what it is given"
        )
    return None


def _lacks_double_backward(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "derivative for" in text or "double backward" in text or "differentiate" in text


def _is_complex(node: Any, tangents: Tangents) -> bool:
    changes = any(t is not None and t.is_complex() for t in tangents)
    return changes or any(m.dtype.is_complex for m in node._input_metadata)
