"""Layers whose weight is computed from parameters: a view, a cast, g v / |v|, W + B A, a table.

All samples share that computation q = f(p). The products with q are those of any layer, and f is
passed once for all samples: by a direction forwards, by the combined gradient back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from irw_optim.gradients.graph import Graph
from irw_optim.gradients.layers import LayerCall, RowsCall, RowWeights
from irw_optim.gradients.places import Places
from irw_optim.gradients.protocol import Direction, widened
from irw_optim.gradients.pushforward import pull_along, push_through


class Chain(NamedTuple):
    """How a tensor was computed from leaves."""

    end: tuple[Node, int]  # what computed it, and the number of its output
    order: Sequence[Node]  # the nodes in between, each before those it reads from
    leaves: Mapping[Node, Tensor]  # by the nodes that accumulate their gradients
    places: Places


class ChainPlaces(NamedTuple):
    """A `Chain`, by the places of its nodes in the order of every graph of one kind."""

    end: tuple[int, int]
    order: tuple[int, ...]
    leaves: tuple[int, ...]
    places: Places

    def among(self, graph: Graph) -> Chain:
        """The chain of one graph."""
        end, number = self.end
        leaves = {graph.leaf_nodes[n]: graph.leaves[n] for n in self.leaves}
        order = [graph.order[n] for n in self.order]
        return Chain((graph.order[end], number), order, leaves, self.places)


class ChainedCall(LayerCall):
    """A call with placeholders as parameters, and for each how it was computed from the model's."""

    # Asked of the call itself:
    recorded = property(attrgetter("call.recorded"))
    input = property(attrgetter("call.input"))
    version = property(attrgetter("call.version"))
    batch_size = property(attrgetter("call.batch_size"))
    output_gradient = property(attrgetter("call.output_gradient"))
    precision = property(attrgetter("call.precision"))
    needs_autograd_combine = property(attrgetter("call.needs_autograd_combine"))
    layout = property(attrgetter("call.layout"))
    layouts = property(attrgetter("call.layouts"))
    settle = property(attrgetter("call.settle"))
    let_go = property(attrgetter("call.let_go"))
    forget_values = property(attrgetter("call.forget_values"))

    def __init__(self, call: LayerCall, chains: Mapping[Tensor, Chain]) -> None:
        self.call = call
        self.chains = dict(chains)
        direct = [p for p in call.parameters.values() if p not in self.chains]
        leaves = [leaf for chain in chains.values() for leaf in chain.leaves.values()]
        self.parameters = {str(n): p for n, p in enumerate(dict.fromkeys([*direct, *leaves]))}
        self.roles = self.parameters
        self.passes_on = call.passes_on
        self.output_shape = call.output_shape

    def set_output_gradient(self, gradient: Tensor) -> None:
        self.call.set_output_gradient(gradient)
        if self.call.makes_rows(gradient.shape):
            self.call = RowsCall(self.call)

    def arrangement(self) -> tuple[object, ...]:
        return type(self.call), *self.call.arrangement()

    def without(self, dropped: Tensor) -> LayerCall:
        part = copy(self)
        part.call = self.call.without(dropped)
        return part

    def copy(self) -> LayerCall:
        part = copy(self)
        part.call = self.call.copy()
        return part

    def dot(self, direction: Direction) -> Tensor:
        mine = set(self.parameters.values())
        reached = {p: v for p, v in direction.items() if p in mine}
        values = dict(reached)
        for placeholder, chain in self.chains.items():
            leaves = enumerate(chain.leaves.values())
            changes = {n: reached[p] for n, p in leaves if p in reached}
            if not changes:
                continue
            if chain.places.reshapes:
                values[placeholder] = widened(changes[0]).reshape(placeholder.shape)
                continue
            change = push_through(chain.order, chain.end[1], chain.places, changes)
            if change is not None:
                values[placeholder] = widened(change)
        return self.call.dot(values)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return self._pulled(self.call.combine(weights))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        blocks = self.call.rows(samples)
        count = len(next(iter(blocks.values())))
        each = [self._pulled({p: rows[i] for p, rows in blocks.items()}) for i in range(count)]
        return {p: torch.stack([row[p] for row in each]) for p in self.parameters.values()}

    def _pulled(self, parts: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        mine = set(self.parameters.values())
        total: dict[Tensor, Tensor] = {}
        for parameter, part in parts.items():
            chain = self.chains.get(parameter)
            found = {parameter: part} if chain is None else _pulled_through(chain, part)
            for leaf, gradient in found.items():
                if leaf in mine:
                    total[leaf] = total[leaf] + gradient if leaf in total else gradient
        for leaf in mine.difference(total):
            total[leaf] = torch.zeros_like(leaf)
        return total


def _pulled_through(chain: Chain, gradient: Tensor) -> dict[Tensor, Tensor]:
    """Without hooks, as scores are taken: where these change gradients, the comparison tells."""
    leaves, places = chain.leaves.values(), chain.places
    if places.reshapes:
        (leaf,) = leaves
        return {leaf: gradient.to(leaf.dtype).reshape(leaf.shape)}
    end = places.first[0] + chain.end[1]
    arrived: list[Tensor | None] = [None] * (places.count + 1)
    arrived[end] = gradient.to(places.dtypes[end])
    pull_along(places.way_back(frozenset(places.leaves)), chain.order, places, arrived)
    found = zip(leaves, (arrived[n] for n in places.leaves), strict=True)
    return {p: g for p, g in found if g is not None}
