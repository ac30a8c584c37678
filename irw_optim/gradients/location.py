"""Where the batch is in what each layer computes: as the graph says, or as the sizes do.

A sequence can be as long as the batch, a table can have as many rows, and T * B rows can be
sorted by sample or by time. No size tells these apart, but the graph does, which was followed from
the losses. Beyond the operation at which it could be followed no further, the likeliest reading is
taken, and compared with autograd as everything there.
"""

from __future__ import annotations

from math import prod

import torch

from irw_optim.gradients.broadcast import sites_of_sums
from irw_optim.gradients.graph import CallSite, Graph
from irw_optim.gradients.layers import Layout
from irw_optim.gradients.mixing import Batch


def arranged(graph: Graph, batch: Batch, batch_size: int) -> list[CallSite]:
    """The layer calls of a graph with the batch brought first, where they have one.

    Calls that are made once for all samples (positions) move to the sums at which they meet them.

    Args:
        graph: as it was walked.
        batch: where the batch is.
        batch_size: B.
    """
    sites: list[CallSite] = []
    for site in graph.sites:
        layouts = site.call.layouts(batch_size, site.shape)
        known = _is_known(graph, batch, site)
        right = [n for n in layouts if _may_be(n, graph, batch, site, batch_size)]
        if site.call.may_lack_batch and not (known and right):
            sums = sites_of_sums(site, graph, batch_size)
            if sums is not None:
                dim, at_sums = sums
                if all(_may_be(Layout(dim), graph, batch, s, batch_size) for s in at_sums):
                    sites += at_sums
                    continue
        site.call.settle(right[0] if right else None, batch_size)
        sites.append(site)
    return sites


def _is_known(graph: Graph, batch: Batch, site: CallSite) -> bool:
    return batch.followed or _place(graph, site) in batch.places


def _may_be(layout: Layout, graph: Graph, batch: Batch, site: CallSite, batch_size: int) -> bool:
    """Whether the output may hold the batch so, for all that the graph says."""
    stride = batch.places.get(_place(graph, site))
    right = stride_in(layout, site.shape, batch_size) == stride
    return right or not _is_known(graph, batch, site)


def _place(graph: Graph, site: CallSite) -> tuple[int, int]:
    return graph.nodes[site.edge.node], site.edge.output_nr


def stride_in(layout: Layout, shape: torch.Size, batch_size: int) -> int:
    """The stride of the batch in a tensor with such a layout.

    >>> stride_in(Layout(1), torch.Size([5, 3, 4]), 3)
    4
    >>> stride_in(Layout(0, "batch major"), torch.Size([15, 4]), 3)
    20
    """
    behind = prod(shape[layout.dim + 1 :])
    if layout.fold == "batch major":
        return behind * shape[layout.dim] // batch_size
    return behind
