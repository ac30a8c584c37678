"""What a kind of graph needs, found once and followed from then on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from irw_optim.gradients.capture import CallSite, Graph
from irw_optim.gradients.coverage import Covering
from irw_optim.gradients.readings import Reading, calls_nodes, sites_of
from irw_optim.gradients.unheard import in_a_pass

_Value = TypeVar("_Value")


class Plan(NamedTuple):
    """For every graph of one kind.

    Attributes:
        readings: the operations that read what the samples share.
        covering: what is known of their products.
    """

    readings: list[Reading]
    covering: Covering

    def sites(self, graph: Graph, losses: Tensor) -> list[CallSite] | None:
        """The layer calls of a graph; None where an operation has other settings than it had."""
        follow = partial(sites_of, self.readings, graph, losses.shape[0])
        return in_a_pass_to_all(losses, graph, follow) if calls_nodes(self.readings) else follow()


def in_a_pass_to_all(losses: Tensor, graph: Graph, look: Callable[[], _Value]) -> _Value:
    """What a look at nodes gives where they know that all of their inputs are wanted."""
    found: list[_Value] = []
    edges = [GradientEdge(leaf, 0) for leaf in graph.leaf_nodes]
    with torch.no_grad():
        in_a_pass(losses, edges, lambda: found.append(look()))
    return found[0]
