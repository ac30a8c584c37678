"""Positions looked up once and added to every sample: finds the batch some operations later.

``tokens(x) + positions(arange(T))`` computes the second term without a batch dimension, so that
no gradient of single samples arrives there. It arrives at the sum, which passes it on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.graph import CallSite, Graph
from irw_optim.gradients.nodes import shape_of

_HANDS_ON = frozenset({"AddBackward0", "UnsqueezeBackward0", "ExpandBackward0", "AliasBackward0"})
"""Operations whose gradient is that of what they read, summed where it was repeated."""


def sites_of_sums(
    site: CallSite, graph: Graph, batch_size: int
) -> tuple[int, list[CallSite]] | None:
    """The call as if every sample had made it, at the places where it meets the batch.

    Args:
        site: a call whose input may have no batch dimension.
        graph: which it belongs to.
        batch_size: B.

    Returns:
        The dimension that holds the batch there, and the sites in place of this one; None where
        anything but a sum reads the output.
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
    """The operations that repeat the output for every sample, and along which dimension."""
    readers = _readers_among(nodes)
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


def _readers_among(nodes: Iterable[Node]) -> dict[tuple[Node | None, int], list[Node]]:
    readers: dict[tuple[Node | None, int], list[Node]] = {}
    for node in nodes:
        for parent in node.next_functions:
            readers.setdefault(parent, []).append(node)
    return readers
