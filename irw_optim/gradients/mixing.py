"""Which operation of a graph can carry one sample's numbers into another sample's loss.

The batch is followed from the losses, (B,), to the leaves, as a stride: in row-major order, number
``n`` of a tensor belongs to sample ``n // stride % B``. An operation that works along the batch, or
has no rule, may mix; so may what is read sample by sample here and whole there.

That says where the batch is in what each layer computes, too. Where sizes coincide and the graph
was not followed, autograd checks the likeliest reading.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from .graph import CallSite, Graph, Opaque
from .layers import Layout
from .mixing_rules import RULES, handed_on, mixing, permuting, removing, reshaped, swapping
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
    # Its stride in each output, or `SHARED`, by the node's place.
    places: Mapping[tuple[int, int], int] = MappingProxyType({})
    reads: tuple[int, ...] = ()  # of each leaf, or of what is made of it, by operations on samples
    computes_shared: bool = False  # whether weights alone make more than views
    crossings: tuple[Crossing, ...] = ()
    surely_mixes: bool = False  # whether `mixed_by` is known to mix
    opaque: Opaque = {}  # noqa: RUF012 (never written to)

    @property
    def followed(self) -> bool:
        """Whether that is to the end."""
        return self.mixed_by is None and bool(self.places)


def follow_batch(losses: Tensor, graph: Graph, *, watched: bool = False) -> Batch:
    """Follow the batch through the graph of losses, (B,), B > 1.

    What operations read that are ``watched`` is taken to hold it as what they make, or first.
    """
    may_mix: str | None = None
    places = {(0, losses.output_nr): 1}
    outputs = {0: [losses.output_nr]}
    reads: dict[Node, int] = {}
    crossings: list[Crossing] = []
    hidden: Opaque = {}
    computes_shared = False
    for at, node in enumerate(graph.order):
        for number in outputs.get(at, ()):
            stride, weight = places[at, number], 1
            if stride == SHARED:
                found: Sequence[int] = [SHARED] * len(node.next_functions)
                weight = reads.get(node, 0)
                computes_shared |= not is_view(node)
            else:
                opaque = watched and is_watched(node)
                try:
                    made = Output(node, number, stride, len(losses))
                    found = _likely(made) if opaque else rule_for(node)(made)
                except (MixesError, AttributeError, IndexError, RuntimeError):
                    # Or another version of torch; or a graph that is freed.
                    surely = rule_for(node) is not mixing
                    return Batch(node.name(), places, surely_mixes=surely)
                if opaque:
                    may_mix = may_mix or node.name()
                    hidden.setdefault(at, ({}, dict(enumerate(found))))[0][number] = stride
            read = list(zip(node.next_functions, found, strict=False))
            shared = [n for n, ((p, _), place) in enumerate(read) if p and place == SHARED]
            if shared and stride != SHARED:
                crossings.append(Crossing(at, number, tuple(shared)))
            for (parent, output), place in read:
                if parent is None or place == UNREAD:
                    continue
                if place == SHARED:
                    reads[parent] = reads.get(parent, 0) + weight
                if not parent.next_functions:
                    continue
                key = graph.nodes[parent], output
                if key not in places:
                    outputs.setdefault(key[0], []).append(output)
                if places.setdefault(key, place) != place:
                    return Batch(parent.name(), places, surely_mixes=True)
    counted = tuple(reads.get(node, 0) for node in graph.leaf_nodes)
    return Batch(may_mix, places, counted, computes_shared, tuple(crossings), opaque=hidden)


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


def arranged(graph: Graph, batch: Batch, batch_size: int) -> list[CallSite]:
    """The layer calls of a graph with the batch first, where they have one."""

    def stride_at(site: CallSite) -> int | None:
        return batch.places.get((graph.nodes[site.edge.node], site.edge.output_nr))

    def may_be(layout: Layout, site: CallSite) -> bool:
        stride = stride_at(site)
        is_known = batch.followed or stride is not None
        return stride_in(layout, site.shape, batch_size) == stride or not is_known

    sites: list[CallSite] = []
    for site in graph.sites:
        stride = stride_at(site)
        offered = list(site.call.layouts(batch_size, site.shape))
        offered += _between(offered, site.shape, stride or 0, batch_size)
        right = [n for n in offered if may_be(n, site)]
        is_known = batch.followed or stride is not None
        if site.call.may_lack_batch and not (is_known and right):
            sums = _sites_of_sums(site, graph, batch_size)
            if sums is not None and all(may_be(Layout(sums[0]), s) for s in sums[1]):
                sites += sums[1]
                continue
        site.call.settle(right[0] if right else None, batch_size)
        sites.append(site)
    return sites


def stride_in(layout: Layout, shape: torch.Size, batch_size: int) -> int:
    """Of the batch, in a tensor with such a layout."""
    behind = prod(shape[layout.dim + 1 :])
    if layout.fold == "batch major":
        return behind * shape[layout.dim] // batch_size
    return behind * layout.inner


def _between(
    offered: Sequence[Layout], shape: torch.Size, stride: int, batch_size: int
) -> list[Layout]:
    found = []
    for layout in offered:
        inner = stride // max(1, prod(shape[layout.dim + 1 :]))
        fits = inner > 1 and shape[layout.dim] % (inner * batch_size) == 0
        if layout.fold == "batch minor" and fits:
            found.append(layout._replace(fold="between", inner=inner))
    return found


_HANDS_ON = frozenset({"AddBackward0", "UnsqueezeBackward0", "ExpandBackward0", "AliasBackward0"})
"""Their gradient is that of what they read, but for repetitions."""


def _sites_of_sums(
    site: CallSite, graph: Graph, batch_size: int
) -> tuple[int, list[CallSite]] | None:
    """As if every sample had made the call, at the sums where it meets the batch.

    ``tokens(x) + positions(arange(T))`` computes the second term without one. None where anything
    else reads the output.
    """
    met = _meets_the_batch(site, graph.nodes, batch_size)
    dims = {dim for _, dim in met}
    if len(dims) != 1:
        return None
    (dim,) = dims
    call = site.call.for_every_sample(batch_size, dim)
    if call is None:
        return None
    shape = torch.Size([*call.recorded.shape, site.shape[-1]])
    if any(shape_of(node) != shape for node, _ in met):
        return None
    return dim, [CallSite(call.copy(), GradientEdge(node, 0), shape) for node, _ in met]


def _meets_the_batch(
    site: CallSite, nodes: Iterable[Node], batch_size: int
) -> list[tuple[Node, int]]:
    """Where it is repeated for every sample, and along which dimension."""
    readers: dict[tuple[Node | None, int], list[Node]] = {}
    for node in nodes:
        for parent in node.next_functions:
            readers.setdefault(parent, []).append(node)
    met: list[tuple[Node, int]] = []
    waiting = [(site.edge.node, site.edge.output_nr, site.shape)]
    while waiting:
        node, number, before = waiting.pop()
        read_by = readers.get((node, number), [])
        if not read_by:
            return []
        for reader in read_by:
            after = shape_of(reader)
            if reader.name() not in _HANDS_ON or getattr(reader, "_saved_alpha", 1) != 1:
                return []
            if after.numel() == before.numel() and batch_size > 1:
                waiting.append((reader, 0, after))
                continue
            padded = [*[1] * (len(after) - len(before)), *before]
            repeated = [d for d, n in enumerate(padded) if n == 1 and after[d] != 1]
            if batch_size == 1 and not repeated:
                repeated = [0]
            if len(repeated) != 1 or after[repeated[0]] != batch_size:
                return []
            met.append((reader, repeated[0]))
    return met
