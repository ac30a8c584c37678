"""The tensors of a graph as numbers: who makes which, who reads it, and of what shape it is.

Looked up once for all graphs of one kind, so that a pass of ours spends its time in the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.forward import FORWARD, ForwardRule, diagonal, of_single_losses
from irw_optim.gradients.graph import Graph
from irw_optim.gradients.mixing import rule_for
from irw_optim.gradients.mixing_rules import RULES, elementwise, handed_on, unreduced
from irw_optim.gradients.nodes import Rule, base_name

NOTHING = -1
"""The number of what has no gradient."""

_OF_KIND: dict[Rule | None, ForwardRule] = {elementwise: diagonal, unreduced: of_single_losses}


class Operation(NamedTuple):
    """What is known of a node, without holding it."""

    reads: tuple[int, ...]  # the numbers of its inputs
    makes: slice  # those of its outputs
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    rule: ForwardRule | None  # None: by its own derivative
    hands_on: bool  # whether each output is one of the inputs
    is_complex: bool


class Push(NamedTuple):
    """A change on its way through one operation."""

    place: int
    operation: Operation
    dying: tuple[int, ...]  # inputs that nobody reads after it
    writes: tuple[tuple[int, int], ...]  # which outputs somebody reads, and their numbers


class Pull(NamedTuple):
    """A gradient on its way back through one operation."""

    place: int
    makes: slice
    reads: tuple[int, ...]  # `NOTHING` for what leads nowhere
    stays: bool  # whether a gradient that is wanted arrives here


class Places:
    """Of the nodes of a graph, each before those it reads from, and of its leaves."""

    def __init__(self, order: Sequence[Node], leaf_nodes: Sequence[Node]) -> None:
        self.first: list[int] = []  # of each node's outputs, then of the leaves
        starts: dict[Node | None, int] = {}
        shapes: list[torch.Size] = []
        dtypes: list[torch.dtype] = []
        node: Any
        for node in (*order, *leaf_nodes):
            starts[node] = len(shapes)
            self.first.append(len(shapes))
            outputs = node._input_metadata
            shapes += [torch.Size(output.shape) for output in outputs]
            dtypes += [output.dtype for output in outputs]
        self.shapes, self.dtypes, self.count = shapes, dtypes, len(shapes)
        self.leaves = self.first[len(order) :]
        bounds = [*self.first, self.count]
        self.operations: list[Operation] = []
        for place, node in enumerate(order):
            reads = tuple(
                starts[parent] + number if parent in starts else NOTHING
                for parent, number in node.next_functions
            )
            makes = slice(*bounds[place : place + 2])
            touched = [dtypes[n] for n in reads if n != NOTHING] + dtypes[makes]
            is_complex = any(dtype.is_complex for dtype in touched)
            operation = Operation(
                reads,
                makes,
                shapes[makes],
                dtypes[makes],
                None if is_complex else _rule_of(node),
                rule_for(node) is handed_on,
                is_complex,
            )
            self.operations.append(operation)
        self._ways_back: dict[frozenset[int], list[Pull]] = {}

    @cached_property
    def way_forward(self) -> list[Push]:
        """The operations, from the leaves on."""
        met: set[int] = set()
        way = []
        for place, operation in enumerate(self.operations):
            first, last = operation.makes.start, operation.makes.stop
            writes = [(n - first, n) for n in range(first, last) if n in met or not place]
            dying = {n for n in operation.reads if n != NOTHING} - met
            way.append(Push(place, operation, tuple(dying), tuple(writes)))
            met |= dying
        return way[::-1]

    def way_back(self, wanted: frozenset[int]) -> list[Pull]:
        """The operations on the way from the end to some tensors."""
        way = self._ways_back.get(wanted)
        if way is None:
            way = self._ways_back[wanted] = self._towards(wanted)
        return way

    def _towards(self, wanted: frozenset[int]) -> list[Pull]:
        needed = set(wanted)
        way = []
        for place in reversed(range(len(self.operations))):
            operation = self.operations[place]
            reads = tuple(n if n in needed else NOTHING for n in operation.reads)
            made = range(operation.makes.start, operation.makes.stop)
            if any(n != NOTHING for n in reads):
                needed.update(made)
                stays = not wanted.isdisjoint(made)
                way.append(Pull(place, operation.makes, reads, stays))
        return way[::-1]


def places_of(graph: Graph) -> Places:
    """Those of its kind."""
    found: Places | None = graph.common.get("places")
    if found is None:
        found = graph.common["places"] = Places(graph.order, graph.leaf_nodes)
    return found


def number_at(edge: GradientEdge, graph: Graph) -> int:
    """Of the tensor whose gradient arrives at an edge."""
    place = graph.nodes.get(edge.node)
    if place is not None:
        return places_of(graph).first[place] + edge.output_nr
    leaf = graph.leaf_numbers.get(edge.node)
    return NOTHING if leaf is None else places_of(graph).leaves[leaf]


def _rule_of(node: Node) -> ForwardRule | None:
    name = base_name(node)
    if name in FORWARD:
        return FORWARD[name]
    return _OF_KIND.get(RULES.get(name))
