"""Which operation of a graph can carry one sample's numbers into another sample's loss.

The batch is followed from the losses, (B,), to the leaves, as a stride: in row-major order, number
``n`` of a tensor belongs to sample ``n // stride % B``. An operation that works along the batch, or
has no rule, may mix; so may what is read sample by sample here and whole there.

That says where the batch is in what each layer computes, too. Where sizes coincide and the graph
was not followed, autograd checks the likeliest reading.
"""

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from .graph import Graph, Opaque
from .mixing_rules import RULES, handed_on, mixing, permuting, removing, reshaped, swapping
from .moved_rows import Rows
from .nodes import COPY, SHARED, UNREAD, MixesError, Output, Rule, base_name, mixes, shape_of
from .packed import ONE_LAYER


class Crossing(NamedTuple):
    """An operation on samples that reads what they share."""

    place: int  # of its node in the graph's order
    output: int  # that holds the batch
    inputs: tuple[int, ...]  # that are shared


class Batch(NamedTuple):
    """Where the batch is in a graph, as far as it can be followed."""

    mixed_by: str | None  # the first operation that may mix the samples
    # Its stride in each output, or `SHARED`, by the node's place; and to whom rows belong.
    places: Mapping[tuple[int, int], tuple[int, int]] = MappingProxyType({})
    reads: tuple[int, ...] = ()  # of each leaf, or of what is made of it, by operations on samples
    computes_shared: bool = False  # whether weights alone make more than views
    crossings: tuple[Crossing, ...] = ()
    surely_mixes: bool = False  # whether `mixed_by` is known to mix
    opaque: Opaque = {}  # noqa: RUF012 (never written to)
    rows: Rows | None = None  # behind indices

    @property
    def followed(self) -> bool:
        """Whether that is to the end."""
        return self.mixed_by is None and bool(self.places)


def follow_batch(losses: Tensor, graph: Graph, *, watched: bool = False) -> Batch:
    """Follow the batch through the graph of losses, (B,), B > 1.

    What operations read that are ``watched`` is taken to hold it as what they make, or first.
    """
    may_mix: str | None = None
    places = {(0, losses.output_nr): (1, 0)}
    rows = Rows(graph, len(losses), losses.device)
    outputs = {0: [losses.output_nr]}
    reads: dict[Node, int] = {}
    crossings: list[Crossing] = []
    hidden: Opaque = {}
    computes_shared = False
    for at, node in enumerate(graph.order):
        for number in outputs.get(at, ()):
            (stride, owners), weight = places[at, number], 1
            theirs: Sequence[int] = [owners] * len(node.next_functions)
            if stride == SHARED:
                found: Sequence[int] = [SHARED] * len(node.next_functions)
                weight = reads.get(node, 0)
                computes_shared |= not is_view(node)
            else:
                opaque = watched and is_watched(node) and not owners
                try:
                    made = Output(node, number, stride, len(rows.owners[owners]))
                    if opaque:
                        found = _likely(made)
                    else:
                        found, theirs = rows.read_by(rule_for(node), at, made, owners)
                except (MixesError, AttributeError, IndexError, RuntimeError):
                    # Or another version of torch; or a graph that is freed.
                    surely = rule_for(node) is not mixing
                    return Batch(node.name(), places, surely_mixes=surely, rows=rows)
                if opaque:
                    may_mix = may_mix or node.name()
                    hidden.setdefault(at, ({}, dict(enumerate(found))))[0][number] = stride
            read = list(zip(node.next_functions, found, theirs, strict=False))
            shared = [n for n, ((p, _), place, _) in enumerate(read) if p and place == SHARED]
            if shared and stride != SHARED:
                crossings.append(Crossing(at, number, tuple(shared)))
            for (parent, output), place, whose in read:
                if parent is None or place == UNREAD:
                    continue
                if place == SHARED:
                    reads[parent] = reads.get(parent, 0) + weight
                if not parent.next_functions:
                    continue
                key = graph.nodes[parent], output
                if key not in places:
                    outputs.setdefault(key[0], []).append(output)
                way = place, 0 if place == SHARED else whose
                if (known := places.setdefault(key, way)) != way:
                    try:
                        places[key] = rows.meet(known, way)
                    except MixesError:
                        return Batch(parent.name(), places, surely_mixes=True, rows=rows)
    counted = tuple(reads.get(node, 0) for node in graph.leaf_nodes)
    met = tuple(crossings)
    return Batch(may_mix, places, counted, computes_shared, met, opaque=hidden, rows=rows)


def _likely(output: Output) -> Sequence[int]:
    """Where the batch may be in what is read; `watching` tells whether it is."""
    if base_name(output.node) == "AsStrided":
        return [_read_from(output)]
    return [_likely_in(edge, output) for edge in output.node.next_functions]


def _likely_in(edge: tuple[Node | None, int], output: Output) -> int:
    node, number = edge
    if node is None:
        return UNREAD
    shape = shape_of(node, number)
    if not node.next_functions or not shape:
        return SHARED
    if shape == tuple(output.shape):
        return output.stride
    dim = output.located[0] if output.located else None
    if dim is not None and [len(shape), shape[dim]] == [len(output.shape), output.shape[dim]]:
        return output.at(shape, dim)
    return SHARED if shape[0] % output.batch_size else shape.numel() // output.batch_size


def _read_from(output: Output) -> int:
    """Of a view of storage, from where its first two samples' gradients begin."""
    device = output.node._input_metadata[output.number].device
    numbers = torch.arange(prod(output.shape), dtype=torch.float64, device=device)
    sample = (numbers // output.stride % output.batch_size).view(tuple(output.shape))
    read, total = (output.node(t).flatten() for t in (torch.ones_like(sample), sample))
    first, second = ((total == n * read).logical_and_(read > 0).nonzero()[0].item() for n in (0, 1))
    stride = int(second - first)
    if stride <= 0 or len(read) % (stride * output.batch_size):
        mixes()
    return stride


def flattened_from(graph: Graph, losses: int) -> torch.Size | None:
    """The shape, with positions, that a view made as many rows of as there are losses."""
    for node in graph.order:
        if base_name(node) in ("UnsafeView", "View"):
            before = shape_of(*node.next_functions[0])
            rows = (*shape_of(node), 0)[0]
            if rows == losses == before[:-1].numel() and 1 < before[0] < losses:
                return before
    return None


_RULE_OF: dict[type[Node], Rule] = {}


def rule_for(node: Node) -> Rule:
    """The rule of a node, by its `base_name`."""
    rule = _RULE_OF.get(type(node))
    if rule is None:
        rule = RULES.get(base_name(node), mixing)
        if isinstance(node, BackwardCFunction) and _is_torchs_identity(node):
            rule = handed_on
        if type(node) is ONE_LAYER:
            rule = _packed
        _RULE_OF[type(node)] = rule
    return rule


def _packed(output: Output) -> Sequence[int]:
    """Whose a row of a packed sequence is, no stride tells."""
    raise MixesError


def is_foreign(node: Node) -> bool:
    """Whether a node is a function in Python of which nothing is known."""
    return isinstance(node, BackwardCFunction) and rule_for(node) is mixing


def is_watched(node: Node) -> bool:
    """Whether it shows only as it runs that a node keeps the samples apart."""
    return base_name(node) in ("AsStrided", COPY) or is_foreign(node)


def is_view(node: Node) -> bool:
    """Whether a node moves numbers alone."""
    return rule_for(node) in (permuting, removing, reshaped, swapping)


def _is_torchs_identity(node: BackwardCFunction) -> bool:
    """Functions by which torch hears a pass."""
    function = getattr(node, "_forward_cls", type(node))
    names = ("BackwardHookFunction", "RegisterPostBackwardFunction", "_DDPSink")
    return function.__module__.startswith("torch.") and function.__name__ in names
