"""Passes of our own through the graph that a forward pass has left: directions forwards, or back.

A node that is called pulls gradients back, u -> J^T u; with what it saved, `forward` pushes changes
forwards, t -> J t. So the derivative of all losses along one direction costs about a forward pass,
with statistics and dropout masks as they were. No hook hears it, and nothing is freed.

A layer whose weight is computed from parameters (g v / |v|, W + B A) has products with that weight
q = f(p), and f is passed once for all samples, either way: a `ChainedCall`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import copy
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .forward._tangents import Tangents, transposed
from .graph import Graph, gradients_at
from .layers import LayerCall, RowsCall, RowWeights, summed
from .nodes import pull
from .places import NOTHING, Operation, Places, Pull, number_at, places_of
from .protocol import Direction, MaterializedGradients, widened


class NoPushForwardError(RuntimeError):
    """An operation whose derivative can only be pulled back."""


def push(node: Node, operation: Operation, tangents: Tangents) -> Tangents:
    """The changes of a node's outputs for changes of its inputs; of the first, if no other."""
    if operation.hands_on:
        return tangents
    try:
        try:
            changes = None if operation.rule is None else operation.rule(node, tangents)
        except (AttributeError, IndexError):  # in another torch; no numbers
            changes = None
        if changes is None:
            changes = transposed(node, tangents)
        changes = [changes] if isinstance(changes, Tensor) else list(changes)
        for number, change in enumerate(changes):
            if change is None:
                continue
            dtype, shape = operation.dtypes[number], operation.shapes[number]
            if change.dtype != dtype or change.shape != shape:
                changes[number] = change.to(dtype).expand(shape)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no double backward; sparse or nested numbers
        reason = str(error).partition("\n")[0]
        raise NoPushForwardError(f"{node.name()}: {reason}") from error
    return changes


def push_through(
    order: Sequence[Node], output: int, places: Places, leaves: Mapping[int, Tensor]
) -> Tensor | None:
    """The change of an output of the first node for those of leaves, by their numbers."""
    changed: list[Tensor | None] = [None] * (places.count + 1)  # the last for `NOTHING`
    for number, change in leaves.items():
        changed[places.leaves[number]] = change
    with torch.no_grad():
        for place, operation, dying, writes in places.way_forward:
            tangents = [changed[n] for n in operation.reads]
            for n in dying:
                changed[n] = None
            for tangent in tangents:
                if tangent is not None:
                    break
            else:
                continue
            changes = push(order[place], operation, tangents)
            for number, n in writes:
                if number < len(changes):
                    changed[n] = changes[number]
    return changed[places.first[0] + output]


def pull_back(
    losses: Tensor, cotangent: Tensor, edges: Sequence[GradientEdge], graph: Graph
) -> list[Tensor | None]:
    """The gradient of <cotangent, losses>, both (B,), at edges of their graph; or None."""
    order, places = graph.order, places_of(graph)
    wanted = [number_at(edge, graph) for edge in edges]
    way = places.way_back(frozenset(wanted))
    arrived: list[Tensor | None] = [None] * (places.count + 1)

    def run() -> None:
        arrived[places.first[0] + losses.output_nr] = cotangent
        pull_along(way, order, places, arrived)

    in_a_pass(losses, edges, run)
    return [None if n == NOTHING else arrived[n] for n in wanted]


def pull_along(
    way: Sequence[Pull], order: Sequence[Node], places: Places, arrived: list[Tensor | None]
) -> None:
    """Hand what has arrived on to what was read."""
    shapes, dtypes = places.shapes, places.dtypes
    sums: set[int] = set()
    with torch.no_grad():
        for place, operation, reads, stays in way:
            makes = operation.makes
            gradients = arrived[makes]
            for gradient in gradients:
                if gradient is not None:
                    break
            else:
                if not operation.fills_in:
                    continue
            if not stays:
                arrived[makes] = [None] * len(gradients)
            for n, part in zip(reads, pull(order[place], gradients), strict=True):
                if n == NOTHING or part is None:
                    continue
                if part.shape != shapes[n]:
                    part = part.sum_to_size(shapes[n])
                if part.dtype != dtypes[n]:
                    part = (part if dtypes[n].is_complex else part.real).to(dtypes[n])
                before = arrived[n]
                if before is None:
                    arrived[n] = part
                elif n in sums:
                    before += part  # nobody else holds it
                else:
                    arrived[n] = before + part
                    sums.add(n)


def push_forward(losses: Tensor, direction: Mapping[int, Tensor], graph: Graph) -> Tensor:
    """How much each loss changes along a direction, by the leaves' numbers: (B,)."""
    if not direction:
        return torch.zeros_like(losses)
    found: list[Tensor | None] = []

    def run() -> None:
        found.append(push_through(graph.order, losses.output_nr, places_of(graph), direction))

    in_a_pass(losses, [GradientEdge(graph.leaf_nodes[n], 0) for n in direction], run)
    (change,) = found
    return torch.zeros_like(losses) if change is None else change


def in_a_pass(losses: Tensor, edges: Sequence[GradientEdge], run: Callable[[], None]) -> None:
    """Run something in a backward pass of autograd's engine from the losses to some edges.

    So nodes know what is needed, and recompute (checkpointing) once.
    """
    detects = torch.is_anomaly_enabled()  # it would report the end
    quiet = torch.autograd.set_detect_anomaly(False) if detects else nullcontext()
    with torch.enable_grad(), suppress(_FinishedError), quiet:
        above: Tensor = _Above.apply(losses, run)  # type: ignore[no-untyped-call]
        gradients_at([above], edges, [losses], retain_graph=True)


class _FinishedError(Exception):
    """Ends the engine's pass before the first node."""


class _Above(torch.autograd.Function):
    """A node above the losses."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        ctx.run()
        raise _FinishedError


class Chain(NamedTuple):
    """How a tensor was computed from leaves."""

    output: int  # number of the output of the first node
    order: Sequence[Node]  # each before those it reads from
    leaves: Sequence[Tensor]
    places: Places


class ChainPlaces(NamedTuple):
    """A `Chain` in every graph of one kind."""

    output: int
    order: tuple[int, ...]
    leaves: tuple[int, ...]
    places: Places

    def among(self, graph: Graph) -> Chain:
        leaves = [graph.leaves[n] for n in self.leaves]
        return Chain(self.output, [graph.order[n] for n in self.order], leaves, self.places)


class ChainedCall(LayerCall):
    """A call with placeholders, and how each was computed from parameters."""

    def __init__(self, call: LayerCall, chains: Mapping[Tensor, Chain]) -> None:
        self.call = call
        self.chains = dict(chains)
        direct = [p for p in call.parameters.values() if p not in self.chains]
        leaves = [leaf for chain in chains.values() for leaf in chain.leaves]
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
        values = {p: direction[p] for p in self.parameters.values() if p in direction}
        for placeholder, chain in self.chains.items():
            changes = {n: values[p] for n, p in enumerate(chain.leaves) if p in values}
            if changes and chain.places.reshapes:
                values[placeholder] = widened(changes[0]).reshape(placeholder.shape)
            elif changes:
                try:
                    change = push_through(chain.order, chain.output, chain.places, changes)
                except NoPushForwardError as error:
                    _tell_once(str(error))
                    rows = (self.rows(slice(i, i + 1)) for i in range(len(self.call.b)))
                    return torch.cat([MaterializedGradients(row).dot(direction) for row in rows])
                if change is not None:
                    values[placeholder] = widened(change)
        return self.call.dot(values)

    def combine(self, weights: RowWeights) -> dict[Tensor, Tensor]:
        return self._pulled(self.call.combine(weights))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        blocks = self.call.rows(samples)
        rows = zip(*blocks.values(), strict=True)
        each = [self._pulled(dict(zip(blocks, row, strict=True))) for row in rows]
        return {p: torch.stack([row[p] for row in each]) for p in self.parameters.values()}

    def _pulled(self, parts: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        total = summed(
            _pulled_through(self.chains[p], part) if p in self.chains else {p: part}
            for p, part in parts.items()
        )
        mine = self.parameters.values()
        return {p: total[p] if p in total else torch.zeros_like(p) for p in mine}


_ASKED_OF_THE_CALL = (
    "recorded input version batch_size output_gradient precision needs_autograd_combine layout "
    "layouts is_sequence settle let_go forget_values"
)
for _name in _ASKED_OF_THE_CALL.split():
    setattr(ChainedCall, _name, property(attrgetter(f"call.{_name}")))


@cache
def _tell_once(reason: str) -> None:
    logging.getLogger("irw_optim").warning(
        "a weight has no double backward (%s): it is passed back once for each sample, exact and "
        "slower",
        reason,
    )


def _pulled_through(chain: Chain, gradient: Tensor) -> dict[Tensor, Tensor]:
    """Without hooks: a comparison tells if these change it."""
    leaves, places = chain.leaves, chain.places
    if places.reshapes:
        (leaf,) = leaves
        return {leaf: gradient.to(leaf.dtype).reshape(leaf.shape)}
    end = places.first[0] + chain.output
    arrived: list[Tensor | None] = [None] * (places.count + 1)
    gradient = gradient.to(places.dtypes[end])
    arrived[end] = gradient.clone() if places.in_python else gradient  # which may write to it
    pull_along(places.way_back(frozenset(places.leaves)), chain.order, places, arrived)
    found = zip(leaves, places.leaves, strict=True)
    return {p: g for p, n in found if (g := arrived[n]) is not None}
