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
from math import prod
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
from irw_optim.gradients.mixing_rules import elementwise, handed_on, unreduced
from irw_optim.gradients.nodes import base_name, pull
from irw_optim.gradients.operations import RULES, rule_for
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
    if rule_for(node) is handed_on:
        return tangents
    rule = None if _is_complex(node, tangents) else _rule_of(node)
    try:
        changes = None if rule is None else rule(node, tangents)
    except AttributeError:  # another version of torch saves it under another name
        changes = None
    if changes is None:
        changes = _transposed(node, tangents)
    found = [changes] if isinstance(changes, Tensor) else changes
    outputs: Any = node._input_metadata
    return [
        None if change is None else _fitted(change, output)
        for change, output in zip_longest(found, outputs)
    ]


def _fitted(change: Tensor, output: Any) -> Tensor:
    if change.dtype != output.dtype:
        change = change.to(output.dtype)
    shape = output.shape
    return change if change.shape == shape else change.expand(shape)


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


def _transposed(node: Any, tangents: Tangents) -> Tangents:
    """J t as the derivative of u -> J^T u, which is linear: any u does."""
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    with torch.enable_grad():
        seeds = [_seed(node, metadata).requires_grad_() for metadata in node._input_metadata]
        try:
            pulled = pull(node, seeds)
            gradients, directions = [], []
            for number, tangent in changing:
                gradient = pulled[number]
                if gradient is not None and gradient.requires_grad:
                    gradients.append(gradient)
                    directions.append(tangent.to(gradient.dtype).expand(gradient.shape))
                elif gradient is not None and gradient.any():
                    raise NoPushForwardError(_SAYS_NOT.format(node.name()))
            if not gradients:
                return [None for _ in seeds]
            found = torch.autograd.grad(gradients, seeds, directions, allow_unused=True)
        except RuntimeError as error:
            if isinstance(error, NoPushForwardError) or not _lacks_double_backward(error):
                raise
            raise NoPushForwardError(str(error).splitlines()[0]) from error
    pushed = [(c, u) for c, u in zip(found, seeds, strict=True) if c is not None]
    if _may_hide(node) and not _add_up(pushed, list(zip(directions, gradients, strict=True))):
        raise NoPushForwardError(_SAYS_NOT.format(node.name()))
    return [None if change is None else change.detach() for change in found]


_SAYS_NOT = "{} does not say how its gradient depends on what it is given"


def _may_hide(node: Node) -> bool:
    """Functions in Python may detach what they are given; copies into views may call such."""
    return base_name(node) in ("", "torch::autograd::CopySlices")


def _seed(node: Node, metadata: Any) -> Tensor:
    shape: Sequence[int] = metadata.shape
    options: Any = {"dtype": metadata.dtype, "device": metadata.device}
    if _may_hide(node):  # no two alike: what is linear is seen to be
        numbers = torch.linspace(0.5, 1.5, prod(shape), dtype=torch.float32)
        return numbers.to(**options).view(shape)
    if base_name(node) == "Logcumsumexp":  # its backward takes a logarithm
        return torch.ones(shape, **options)
    return torch.zeros(shape, **options)


_Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def _add_up(pushed: _Pairs, pulled: _Pairs) -> bool:
    """Whether <J t, u> = <t, J^T u>."""
    (left, _), (right, size) = _inner(pushed), _inner(pulled)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(pulled[0][0].dtype, 1e-1)
    return bool(torch.as_tensor(left - right).abs() <= tolerance * size)


def _inner(pairs: _Pairs) -> tuple[Tensor | float, Tensor | float]:
    """A sum of products, and that of their sizes."""
    terms = [(a.detach().conj() * b.detach()).real for a, b in pairs]
    return sum(t.sum() for t in terms), sum(t.abs().sum() for t in terms)


def _lacks_double_backward(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "derivative for" in text or "double backward" in text or "differentiate" in text


def _is_complex(node: Any, tangents: Tangents) -> bool:
    for tangent in tangents:
        if tangent is not None and tangent.is_complex():
            return True
    return any(m.dtype.is_complex for m in node._input_metadata)
