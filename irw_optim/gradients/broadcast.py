"""Positions looked up once and added to every sample: finds the batch some operations later.

``tokens(x) + positions(arange(T))`` computes the second term without a batch dimension, so that
no gradient of single samples arrives there. It arrives at the sum, which passes it on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.capture import CallSite, Graph, output_shape

_HANDS_ON = frozenset({"AddBackward0", "UnsqueezeBackward0", "ExpandBackward0", "AliasBackward0"})
"""Operations whose gradient is that of what they read, summed where it was repeated."""


def sites_of_sums(site: CallSite, graph: Graph, batch_size: int) -> dict[int, list[CallSite]]:
    """The call as if every sample had made it, at the places where it meets the batch.

    Args:
        site: a call whose input may have no batch dimension.
        graph: which it belongs to.
        batch_size: B.

    Returns:
        By the dimension that holds the batch there: the sites in place of this one.
    """
    ways = {dim: site.call.for_every_sample(batch_size, dim) for dim in (0, 1)}
    met = _meets_the_batch(site, graph.nodes, batch_size) if any(ways.values()) else []
    found = {}
    for dim, call in ways.items():
        if call is not None and met:
            shape = torch.Size([*call.recorded.shape, site.shape[-1]])
            if all(output_shape(node) == shape for node in met):
                found[dim] = [CallSite(call.copy(), GradientEdge(n, 0), shape) for n in met]
    return found


def _meets_the_batch(site: CallSite, nodes: set[Node], batch_size: int) -> list[Node]:
    """Where copies of the output first become more numbers; none where anything else reads it."""
    readers = _readers_among(nodes)
    numbers = site.shape.numel()
    met: list[Node] = []
    waiting = [(site.edge.node, site.edge.output_nr)]
    while waiting:
        read_by = readers.get(waiting.pop(), [])
        if not read_by:
            return []
        for node in read_by:
            if node.name() not in _HANDS_ON or getattr(node, "_saved_alpha", 1) != 1:
                return []
            shape = output_shape(node)
            if shape is None:
                return []
            if shape.numel() == numbers and batch_size > 1:
                waiting.append((node, 0))
            else:
                met.append(node)
    return met


def _readers_among(nodes: Iterable[Node]) -> dict[tuple[Node | None, int], list[Node]]:
    readers: dict[tuple[Node | None, int], list[Node]] = {}
    for node in nodes:
        for parent in node.next_functions:
            readers.setdefault(parent, []).append(node)
    return readers
