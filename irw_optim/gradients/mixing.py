"""Which operation of a graph can carry one sample's numbers into another sample's loss.

A forward that treats its samples apart is a stack of operations that leave one dimension alone:
the batch. Where it lies is followed from the losses, of shape (B,), to the leaves. Reshaping moves
it, so it is kept as a stride: of a tensor's numbers in row-major order, number ``n`` belongs to
sample ``n // stride % B``. An operation that works along the batch, or of which no rule is known,
may mix; so may one whose result is read sample by sample here and whole there, ``h - h.mean(0)``.
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
    """An operation on samples that reads tensors which they share: weights, or made of weights."""

    place: int  # of its node in the graph's order
    output: int  # number of the output that holds the batch
    inputs: tuple[int, ...]  # numbers of the shared inputs


class Batch(NamedTuple):
    """Where the batch is in a graph, as far as it can be followed.

    Attributes:
        mixed_by: the first operation that may mix the samples; None where none can.
        places: the stride of the batch in each output that was met, or `SHARED`, by the place of
            its node in the graph's order.
        reads: for each leaf, how many operations on samples read it, or what is computed of it.
        computes_shared: whether anything that is one for all samples is computed, beyond views.
        crossings: where an operation on samples reads what they share.
        surely_mixes: whether `mixed_by` is known to mix the samples, or just not known not to.
    """

    mixed_by: str | None
    places: Mapping[tuple[int, int], int] = MappingProxyType({})
    reads: tuple[int, ...] = ()
    computes_shared: bool = False
    crossings: tuple[Crossing, ...] = ()
    surely_mixes: bool = False

    @property
    def followed(self) -> bool:
        """Whether it is known to the end of the graph where the batch is."""
        return self.mixed_by is None and bool(self.places)


def follow_batch(
    losses: Tensor, graph: Graph, opaque: Callable[[Node], bool] | None = None
) -> Batch:
    """Follow the batch through the graph of losses, (B,), B > 1.

    Nothing is known of ``opaque`` operations. The batch is taken to come first in what they read,
    and the first of them may mix the samples.
    """
    may_mix: str | None = None
    places: dict[tuple[Node, int], int] = {(losses.grad_fn, losses.output_nr): 1}  # type: ignore[dict-item]
    outputs: dict[Node, list[int]] = {losses.grad_fn: [losses.output_nr]}  # type: ignore[dict-item]
    reads: dict[Node, int] = {}
    crossings: list[Crossing] = []
    computes_shared = False
    for node in graph.order:
        for number in outputs.get(node, ()):
            stride, weight = places[node, number], 1
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
                    surely = is_known(node)
                    return Batch(node.name(), _by_number(places, graph), surely_mixes=surely)
            read = list(zip(node.next_functions, found, strict=False))
            shared = [n for n, ((p, _), place) in enumerate(read) if p and place == SHARED]
            if shared and stride != SHARED:
                crossings.append(Crossing(graph.nodes[node], number, tuple(shared)))
            for (parent, output), place in read:
                if parent is None or place == UNREAD:
                    continue
                if place == SHARED:
                    reads[parent] = reads.get(parent, 0) + weight
                if not parent.next_functions:
                    continue  # a leaf: what reads it says what it is
                known = outputs.setdefault(parent, [])
                if output not in known:
                    known.append(output)
                    places[parent, output] = place
                elif places[parent, output] != place:
                    return Batch(parent.name(), _by_number(places, graph), surely_mixes=True)
    counted = tuple(reads.get(node, 0) for node in graph.leaf_nodes)
    places_by_number = _by_number(places, graph)
    return Batch(may_mix, places_by_number, counted, computes_shared, tuple(crossings))


def _first_in(edge: tuple[Node | None, int], batch_size: int) -> int:
    """The stride of the batch if it comes first in what is read at an edge."""
    node, number = edge
    if node is None:
        return UNREAD
    shape = shape_of(node, number)
    if not node.next_functions or not shape or shape[0] % batch_size:
        return SHARED
    return shape.numel() // batch_size


def _by_number(places: Mapping[tuple[Node, int], int], graph: Graph) -> dict[tuple[int, int], int]:
    return {(graph.nodes[node], output): place for (node, output), place in places.items()}


def rows_that_entered(graph: Graph, batch: Batch, losses: int) -> int | None:
    """How many rows entered the model, where the samples are parts of them, such as tokens."""
    if batch.followed:
        outputs = [
            Output(graph.order[place], number, stride, losses)
            for (place, number), stride in batch.places.items()
            if stride != SHARED
        ]
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
    """The rule of a node, by its name without what numbers its variants: ``MeanBackward1``."""
    rule = _RULE_OF.get(type(node))
    if rule is None:
        rule = RULES.get(base_name(node), mixing)
        if isinstance(node, BackwardCFunction):  # a function in Python may have any name
            rule = handed_on if _is_torchs_identity(node) else mixing
        if type(node) is ENDS_RUN:
            rule = _packed
        _RULE_OF[type(node)] = rule
    return rule


def _packed(output: Output) -> Sequence[int]:
    """Whose a row of a packed sequence is, no stride tells."""
    raise MixesError


def is_known(node: Node) -> bool:
    """Whether a node has a rule."""
    return rule_for(node) is not mixing


def is_foreign(node: Node) -> bool:
    """Whether a node is a function in Python of which nothing is known."""
    return isinstance(node, BackwardCFunction) and not is_known(node)


def is_view(node: Node) -> bool:
    """Whether a node hands on numbers as they are."""
    return rule_for(node) in (permuting, removing, reshaped, swapping)


def _is_torchs_identity(node: BackwardCFunction) -> bool:
    """Functions by which torch hears a pass: module hooks, FSDP, DistributedDataParallel."""
    function = getattr(node, "_forward_cls", type(node))
    names = ("BackwardHookFunction", "RegisterPostBackwardFunction", "_DDPSink")
    return function.__module__.startswith("torch.") and function.__name__ in names
