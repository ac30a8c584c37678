"""Positions looked up once and added to every sample: finds the batch one operation later.

``tokens(x) + positions(arange(T))`` computes the second term without a batch dimension, so that
no gradient of single samples arrives there. It arrives at the sum, which passes it on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.capture import CallSite, Graph, output_shape


def with_batch(graph: Graph, batch_size: int) -> Graph:
    """The graph with such calls moved to the sums that they enter; others stay as they are."""
    moved: list[CallSite] = []
    for site in graph.sites:
        lacks_batch = site.shape[:1] != (batch_size,)
        sums = _sums_entered(site, graph.nodes) if lacks_batch else None
        call = None if sums is None else site.call.for_every_sample(batch_size)
        if sums is None or call is None:
            moved.append(site)
            continue
        shape = torch.Size([*call.input.shape, site.shape[-1]])
        if any(output_shape(node) != shape for node in sums):
            moved.append(site)
        else:
            moved += [CallSite(call.copy(), GradientEdge(node, 0), shape) for node in sums]
    return graph._replace(sites=moved)


def _sums_entered(site: CallSite, nodes: Iterable[Node]) -> list[Node] | None:
    """The additions that read the output, or None where anything else reads it."""
    output = (site.edge.node, site.edge.output_nr)
    readers = [node for node in nodes for parent in node.next_functions if parent == output]
    plain = all(n.name() == "AddBackward0" and getattr(n, "_saved_alpha", 0) == 1 for n in readers)
    return readers if readers and plain else None
