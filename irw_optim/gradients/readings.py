"""Layers, seen in the graph: operations on samples that read what all samples share.

These are weights, or computed from weights alone: a class token or LoRA cost what a layer costs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .backward_passes import unless_recomputed
from .coverage import Covering
from .graph import CallSite, Graph, Plan, Remade
from .layers import FIRST, LayerCall, Layout, LinearCall
from .mixing import Batch, follow_batch
from .moved_rows import PaddedLayout, Rows, rows_along
from .node_rules import FUSED_CELLS, NodeRule, Weight, Weights, of_each_number, rule_of, summands
from .nodes import base_name
from .places import Places
from .pushforward import ChainedCall, ChainPlaces, in_a_pass

_Value = TypeVar("_Value")

_INPUTS = {"Addmm": "_saved_mat1", "Mm": "_saved_self"}
"""How products with a weight, or with its transpose, call the samples."""


class Reading(NamedTuple):
    """An operation that reads what the samples share, in every graph of one kind."""

    place: int  # of its node in the graph's order
    output: int  # number of the output that holds the batch
    rule: NodeRule
    weights: Weights
    computed: tuple[Weight, ...]  # those of them that were computed
    calls: int = 1  # that it makes
    layouts: tuple[Layout | None, ...] | None = None  # of each call; None until they are known


Found: TypeAlias = tuple[list[Reading], list[CallSite]] | None
"""Readings and the layer calls of one graph; None where an operation has no quick products."""

NOTHING_READ: Found = ([], [])
"""Where reading would cost too much memory."""


def read(graph: Graph, batch: Batch, own: Iterable[Tensor]) -> Found:
    """What a graph reads, for the gradients of its ``own`` leaves."""
    mine = set(own)
    leaves = {node: n for n, node in enumerate(graph.leaf_nodes) if graph.leaves[n] in mine}
    readings: list[Reading] = []
    sites: list[CallSite] = []
    cells: set[Node] = set()
    for place, output, inputs in batch.crossings:
        node: Any = graph.order[place]
        if node in cells:  # another output of it was met
            continue
        if base_name(node) in FUSED_CELLS:
            cells.add(node)
        turns = base_name(node) in _INPUTS
        shared = {n: _weight_at(node.next_functions[n], graph, leaves, turns) for n in inputs}
        weights = {n: weight for n, weight in shared.items() if weight is not None}
        for at, number, rule, some in _read_at(place, output, weights, graph) if weights else ():
            if at is None or rule is None:
                return None
            computed = tuple(w for w in some.values() if w.chain is not None)
            reading = Reading(at, number, rule, some, computed)
            if (found := sites_of([reading], graph)) is None:
                return None
            readings.append(reading._replace(calls=len(found)))
            sites += found
    return readings, sites


def _read_at(
    place: int, output: int, weights: Weights, graph: Graph
) -> Iterator[tuple[int | None, int, NodeRule | None, Weights]]:
    """The output at which each thing that is read gets its gradient, and the rule; or None."""
    node: Any = graph.order[place]
    ends = FUSED_CELLS.get(base_name(node))
    if ends is None:
        rule = None if _is_complex(node, weights, graph) else rule_of(node, output, weights)
        yield place, output, rule, weights
        return
    for n, weight in weights.items():
        edges = [node.next_functions[end] for end in ends.get(n, (n,))]
        made_by, output = next((edge for edge in edges if edge[0]), edges[0])
        yield graph.nodes.get(made_by), output, summands if n in ends else None, {n: weight}


def read_in_a_pass(
    losses: Tensor, graph: Graph, batch: Batch, own: Iterable[Tensor], *, spares_memory: bool
) -> Found:
    """`NOTHING_READ` where it ``spares_memory`` and would recompute a part."""
    look = partial(read, graph, batch, own)
    careful = partial(unless_recomputed, look, NOTHING_READ)
    return in_a_pass_to_all(losses, graph, careful if spares_memory else look)


def read_around(losses: Tensor, graph: Graph, own: Sequence[Tensor]) -> tuple[Batch, Found]:
    """Where the batch is around watched nodes, and what is read there; None if not all."""
    batch = follow_batch(losses, graph, watched=True)
    if not batch.reads:
        return batch, None
    found = in_a_pass_to_all(losses, graph, partial(read, graph, batch, own))
    sites = [] if found is None else found[1]
    met = {p for site in sites for p in site.call.parameters.values()}
    return batch, found if met.issuperset(own) else None


def sites_of(
    readings: Iterable[Reading],
    graph: Graph,
    batch_size: int | None = None,
    rows: Rows | None = None,
) -> list[CallSite] | None:
    """The layer calls of a graph; with a ``batch_size`` in their layouts. None for new settings."""
    sites: list[CallSite] = []
    for reading in readings:
        node: Any = graph.order[reading.place]
        calls = reading.rule(node, reading.weights)
        if calls is None:
            return None
        if reading.computed:
            calls = [_chained(call, reading.computed, graph) for call in calls]
        edge = GradientEdge(node, reading.output)
        shape = torch.Size(node._input_metadata[reading.output].shape)
        for number, call in enumerate(calls):
            if batch_size is not None:
                if reading.layouts is None or len(reading.layouts) != len(calls):
                    return None
                layout = reading.layouts[number]
                if rows is not None and isinstance(layout, PaddedLayout):
                    layout = rows.padded(layout.rows, layout.owners)
                call.settle(layout, batch_size)
            sites.append(CallSite(call, edge, call.output_shape or shape))
    return sites


def plan_of(readings: Sequence[Reading], graph: Graph, covering: Covering, batch: Batch) -> Plan:
    """For graphs of the kind of one whose calls have their layouts."""
    settled, ways = _with_layouts(readings, graph), batch.rows.ways if batch.rows else ()

    def read(graph: Graph, losses: Tensor) -> list[CallSite] | None:
        rows = rows_along(ways, graph, losses) if ways else None
        if ways and rows is None:
            return None
        return sites_of(settled, graph, losses.shape[0], rows)

    def read_in_a_pass(graph: Graph, losses: Tensor) -> list[CallSite] | None:
        return in_a_pass_to_all(losses, graph, partial(read, graph, losses))

    asks = any(reading.rule is of_each_number for reading in readings)
    return Plan(covering, read_in_a_pass if asks else read, _remade(readings, graph), batch.opaque)


def _remade(readings: Sequence[Reading], graph: Graph) -> list[Remade] | None:
    """Where these are all there is."""
    remade: list[Remade] = []
    if len(readings) != len(graph.sites):
        return None
    for reading, site in zip(readings, graph.sites, strict=True):
        node, call = site.edge.node, site.call
        input = _INPUTS.get(base_name(node))
        if input is None or graph.order[reading.place] is not node or type(call) is not LinearCall:
            return None
        if call.layout != FIRST or call.input.ndim != 2:
            return None
        known = copy(call)
        known.let_go()
        known.layout = FIRST  # told by identity
        remade.append(Remade(reading.place, input, known, site.shape))
    parameters = [p for known in remade for p in known.call.parameters.values()]
    return remade if len(set(parameters)) == len(parameters) else None


def in_a_pass_to_all(losses: Tensor, graph: Graph, look: Callable[[], _Value]) -> _Value:
    """What a look at nodes gives while all their inputs are wanted."""
    found: list[_Value] = []
    edges = [GradientEdge(leaf, 0) for leaf in graph.leaf_nodes]
    with torch.no_grad():
        in_a_pass(losses, edges, lambda: found.append(look()))
    return found[0]


def _chained(call: LayerCall, computed: Sequence[Weight], graph: Graph) -> LayerCall:
    mine = set(call.parameters.values())
    chains = {w.tensor: w.chain.among(graph) for w in computed if w.tensor in mine and w.chain}
    return ChainedCall(call, chains) if chains else call


def _with_layouts(readings: Sequence[Reading], graph: Graph) -> list[Reading]:
    found: dict[tuple[Node, int], list[Layout | None]] = {}
    for call, edge, *_ in graph.sites:
        layout = FIRST if call.layout == FIRST else call.layout  # told by identity, in a hurry
        found.setdefault((edge.node, edge.output_nr), []).append(layout)
    settled = []
    for reading in readings:  # several may be at one edge
        there = found.get((graph.order[reading.place], reading.output), [])
        settled.append(reading._replace(layouts=tuple(there[: reading.calls]) or None))
        del there[: reading.calls]
    return settled


def _weight_at(
    edge: tuple[Any, int], graph: Graph, leaves: Mapping[Node, int], turns: bool
) -> Weight | None:
    """What is read at an edge; None where nothing that is wanted made it."""
    node, number = edge
    turned = turns and base_name(node) == "T"
    behind = node.next_functions[0][0] if turned else node
    while base_name(behind) == "ToCopy":
        behind = behind.next_functions[0][0]
    if behind in leaves:
        return Weight(graph.leaves[leaves[behind]], None, turned)
    order, made_of = _part_above(node, graph, leaves)
    if not made_of:
        return None
    metadata = node._input_metadata[number]
    stand_in = torch.empty(tuple(metadata.shape), dtype=metadata.dtype, device="meta")
    nodes, leaf_nodes = [graph.order[n] for n in order], [graph.leaf_nodes[n] for n in made_of]
    chain = ChainPlaces(number, order, made_of, Places(nodes, leaf_nodes))
    return Weight(stand_in.requires_grad_(), chain)


def _part_above(
    node: Node, graph: Graph, leaves: Mapping[Node, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a computed weight is made of: nodes, in order, and leaves, by their places."""
    seen, waiting = {node}, [node]
    while waiting:
        for parent, _ in waiting.pop().next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    order = sorted(graph.nodes[n] for n in seen if n in graph.nodes)
    return tuple(order), tuple(leaves[n] for n in seen if n in leaves)


def _is_complex(node: Any, weights: Weights, graph: Graph) -> bool:
    made_of = [n for w in weights.values() if w.chain is not None for n in w.chain.leaves]
    tensors = [*(w.tensor for w in weights.values()), *(graph.leaves[n] for n in made_of)]
    dtypes = [*(m.dtype for m in node._input_metadata), *(t.dtype for t in tensors)]
    return any(dtype.is_complex for dtype in dtypes)
