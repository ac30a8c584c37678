"""The layer calls of a graph, with the batch in front."""

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch.autograd.graph import GradientEdge, Node

from .graph import CallSite, Graph
from .layers import Layout
from .mixing import Batch
from .moved_rows import PaddedLayout, Rows
from .nodes import shape_of

PADDED = 4
"""Times as many rows as there are, at most, with as many for each sample."""


def arranged(graph: Graph, batch: Batch, batch_size: int) -> list[CallSite]:
    """The layer calls of a graph with the batch first, where they have one."""

    def place_at(site: CallSite) -> tuple[int | None, int]:
        key = graph.nodes[site.edge.node], site.edge.output_nr
        return batch.places.get(key, (None, 0))

    def may_be(layout: Layout, site: CallSite) -> bool:
        stride, _ = place_at(site)
        is_known = batch.followed or stride is not None
        return stride_in(layout, site.shape, batch_size) == stride or not is_known

    sites: list[CallSite] = []
    for site in graph.sites:
        stride, owners = place_at(site)
        if owners and batch.rows and stride:
            site.call.settle(_padded(site, stride, owners, batch.rows), batch_size)
            sites.append(site)
            continue
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


def _padded(site: CallSite, stride: int, owners: int, rows: Rows) -> PaddedLayout | None:
    count, call = len(rows.owners[owners]), site.call
    for layout in call.layouts(count, site.shape) if call.is_sequence else ():
        if stride_in(layout, site.shape, count) == stride:
            found = rows.padded(layout, owners)
            return found if found.most * len(rows.owners[0]) <= PADDED * count else None
    return None


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
