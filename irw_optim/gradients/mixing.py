"""Which operation of a graph can carry one sample's numbers into another sample's loss.

The batch is followed from the losses, (B,), to the leaves, as a stride: in row-major order, number
``n`` of a tensor belongs to sample ``n // stride % B``. An operation that works along the batch, or
has no rule, may mix; so may what is read sample by sample here and whole there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from irw_optim.gradients.graph import Graph
from irw_optim.gradients.mixing_rules import (
    RULES,
    handed_on,
    mixing,
    permuting,
    removing,
    reshaped,
    swapping,
)
from irw_optim.gradients.nodes import SHARED, UNREAD, MixesError, Output, Rule, base_name, shape_of
from irw_optim.gradients.packed import ENDS_RUN


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

    @property
    def followed(self) -> bool:
        """Whether that is to the end."""
        return self.mixed_by is None and bool(self.places)


def follow_batch(
    losses: Tensor, graph: Graph, opaque: Callable[[Node], bool] | None = None
) -> Batch:
    """Follow the batch through the graph of losses, (B,), B > 1.

    ``opaque`` operations may mix; the batch is taken to come first in what they read.
    """
    may_mix: str | None = None
    places = {(0, losses.output_nr): 1}
    outputs = {0: [losses.output_nr]}
    reads: dict[Node, int] = {}
    crossings: list[Crossing] = []
    computes_shared = False
    for at, node in enumerate(graph.order):
        for number in outputs.get(at, ()):
            stride, weight = places[at, number], 1
            if stride == SHARED:
                found: Sequence[int] = [SHARED] * len(node.next_functions)
                weight = reads.get(node, 0)
                computes_shared |= not is_view(node)
            elif opaque is not None and opaque(node):
                may_mix = may_mix or node.name()
                found = [_first_in(edge, len(losses)) for edge in node.next_functions]
            else:
                try:
                    found = rule_for(node)(Output(node, number, stride, len(losses)))
                except (MixesError, AttributeError, RuntimeError):
                    # Or another version of torch; or a graph that is freed.
                    surely = rule_for(node) is not mixing
                    return Batch(node.name(), places, surely_mixes=surely)
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
                    continue  # a leaf: what reads it says what it is
                key = graph.nodes[parent], output
                if key not in places:
                    outputs.setdefault(key[0], []).append(output)
                if places.setdefault(key, place) != place:
                    return Batch(parent.name(), places, surely_mixes=True)
    counted = tuple(reads.get(node, 0) for node in graph.leaf_nodes)
    return Batch(may_mix, places, counted, computes_shared, tuple(crossings))


def _first_in(edge: tuple[Node | None, int], batch_size: int) -> int:
    """The stride of the batch if it comes first."""
    node, number = edge
    if node is None:
        return UNREAD
    shape = shape_of(node, number)
    if not node.next_functions or not shape or shape[0] % batch_size:
        return SHARED
    return shape.numel() // batch_size


def rows_that_entered(graph: Graph, batch: Batch, losses: int) -> int | None:
    """How many rows entered, where the samples are parts of these, such as tokens."""
    if batch.followed:
        held = [(*at, stride) for at, stride in batch.places.items() if stride != SHARED]
        outputs = [Output(graph.order[n], number, stride, losses) for n, number, stride in held]
        entered = {output.shape[0] for output in outputs if output.located is None}
    elif any(site.call.layout is not None for site in graph.sites):
        return None
    else:
        shapes = {shape[:2] for node in graph.order if len(shape := shape_of(node)) > 2}
        parted = any(rows * length == losses for rows, length in shapes)
        entered = {rows for rows, _ in shapes} if parted else set()
    (rows, *others) = entered or {1}
    return rows if not others and 1 < rows < losses and losses % rows == 0 else None


_RULE_OF: dict[type[Node], Rule] = {}


def rule_for(node: Node) -> Rule:
    """The rule of a node, by its `base_name`."""
    rule = _RULE_OF.get(type(node))
    if rule is None:
        rule = RULES.get(base_name(node), mixing)
        if isinstance(node, BackwardCFunction) and _is_torchs_identity(node):
            rule = handed_on
        if type(node) is ENDS_RUN:
            rule = _packed
        _RULE_OF[type(node)] = rule
    return rule


def _packed(output: Output) -> Sequence[int]:
    """Whose a row of a packed sequence is, no stride tells."""
    raise MixesError


def is_foreign(node: Node) -> bool:
    """Whether a node is a function in Python of which nothing is known."""
    return isinstance(node, BackwardCFunction) and rule_for(node) is mixing


def is_view(node: Node) -> bool:
    """Whether a node moves numbers alone."""
    return rule_for(node) in (permuting, removing, reshaped, swapping)


def _is_torchs_identity(node: BackwardCFunction) -> bool:
    """Functions by which torch hears a pass."""
    function = getattr(node, "_forward_cls", type(node))
    names = ("BackwardHookFunction", "RegisterPostBackwardFunction", "_DDPSink")
    return function.__module__.startswith("torch.") and function.__name__ in names
