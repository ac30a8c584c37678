"""The tensors of a graph as numbers, once for its kind: who makes which, and who reads it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from .forward import FORWARD
from .forward._plain import RESHAPED, by_pull, diagonal, of_single_losses, reshaped
from .forward._tangents import ForwardRule
from .graph import Graph
from .mixing import rule_for
from .mixing_rules import RULES, elementwise, handed_on, unreduced
from .nodes import Rule, base_name, shape_in
from .packed import ONE_LAYER, push_layer

NOTHING = -1
"""The number of what has no gradient."""

_OF_KIND: dict[Rule | None, ForwardRule] = {elementwise: diagonal, unreduced: of_single_losses}

_MOVES = "Cat Permute Select Slice Stack T Transpose Unbind ViewAsComplex ViewAsReal"
_OF_COMPLEX = {*RESHAPED, *_MOVES.split()}
"""What is done to complex numbers is done to the change."""


class Operation(NamedTuple):
    """What is known of a node."""

    reads: tuple[int, ...]  # the numbers of its inputs
    makes: slice  # those of its outputs
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    rule: ForwardRule | None  # None: by its own derivative
    hands_on: bool  # whether each output is one of the inputs
    fills_in: bool  # whether zeros arrive where nothing does


class Push(NamedTuple):
    """A change on its way through one operation."""

    place: int
    operation: Operation
    dying: tuple[int, ...]  # inputs that nobody reads after it
    writes: tuple[tuple[int, int], ...]  # which outputs somebody reads, and their numbers


class Pull(NamedTuple):
    """A gradient on its way back through one operation."""

    place: int
    operation: Operation
    reads: tuple[int, ...]  # `NOTHING` for what leads nowhere
    stays: bool  # whether a gradient that is wanted arrives here


class Places:
    """Of the nodes of a graph, each before those it reads from, and of its leaves."""

    def __init__(self, order: Sequence[Node], leaf_nodes: Sequence[Node]) -> None:
        self.first: list[int] = []  # of each node's outputs, then of the leaves
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.nested = False  # whether lengths differ inside of a tensor, which rules do not know
        starts: dict[Node | None, int] = {}
        node: Any
        for node in (*order, *leaf_nodes):
            starts[node] = len(self.shapes)
            self.first.append(starts[node])
            outputs = node._input_metadata
            self.nested |= any(output.is_nested_tensor for output in outputs)
            self.shapes += [shape_in(output) for output in outputs]
            self.dtypes += [output.dtype for output in outputs]
        self.count = len(self.shapes)
        self.leaves = self.first[len(order) :]
        self.operations: list[Operation] = []
        for node, first in zip(order, self.first, strict=False):
            makes = slice(first, first + len(node._input_metadata))
            edges = node.next_functions
            reads = tuple(starts[p] + number if p in starts else NOTHING for p, number in edges)
            self.operations.append(self._operation(node, reads, makes))
        self.in_python = any(operation.fills_in for operation in self.operations)
        self._ways_back: dict[frozenset[int], list[Pull]] = {}
        # One leaf, and only its shape changes.
        self.reshapes = len(leaf_nodes) == 1 and all(base_name(n) in RESHAPED for n in order)

    def _operation(self, node: Node, reads: tuple[int, ...], makes: slice) -> Operation:
        shapes, dtypes = self.shapes[makes], self.dtypes[makes]
        name, touched = base_name(node), {self.dtypes[n] for n in reads if n != NOTHING} | {*dtypes}
        rule = FORWARD.get(name, _OF_KIND.get(RULES.get(name)))
        if name in RESHAPED:
            rule = reshaped(shapes[0])
        if name not in _OF_COMPLEX and any(dtype.is_complex for dtype in touched):
            rule = None
        if rule is diagonal and len(reads) == len(shapes) == 1:
            alike = shapes == self.shapes[slice(reads[0], reads[0] + 1)] and len(touched) == 1
            rule = by_pull if alike else rule
        hands_on = rule_for(node) is handed_on
        in_python = isinstance(node, BackwardCFunction)
        if type(node) is ONE_LAYER:
            rule, in_python = push_layer, False
        return Operation(reads, makes, shapes, dtypes, rule, hands_on, in_python)

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
        """Those on the way from the end to some tensors."""
        if wanted in self._ways_back:
            return self._ways_back[wanted]
        needed, way = set(wanted), []
        for place, operation in reversed(list(enumerate(self.operations))):
            reads = tuple(n if n in needed else NOTHING for n in operation.reads)
            made = range(operation.makes.start, operation.makes.stop)
            if any(n != NOTHING for n in reads):
                needed.update(made)
                way.append(Pull(place, operation, reads, not wanted.isdisjoint(made)))
        return self._ways_back.setdefault(wanted, way[::-1])


def places_of(graph: Graph) -> Places:
    """The places of all graphs of its kind."""
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
