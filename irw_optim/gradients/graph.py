"""The autograd graph behind a vector of losses, and what its kind tells."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointFunction

from irw_optim.torch_internals import run_backward

from .layers import LayerCall, LinearCall
from .mixing_rules import RULES, picking
from .nodes import base_name, is_block, picks_of

if TYPE_CHECKING:
    from .coverage import Covering

_Value = TypeVar("_Value")

Opaque: TypeAlias = dict[int, tuple[dict[int, int], dict[int, int]]]
"""By a node's place: the strides of the batch in what it makes and what it reads, by number."""


class CallSite(NamedTuple):
    """A layer's call and the edge at which its output gradient arrives."""

    call: LayerCall
    edge: GradientEdge
    shape: torch.Size
    is_plain: bool = False  # a `Remade` call: makes no rows, and takes b as it is


@dataclass(eq=False)
class Graph:
    """What leads to a vector of losses."""

    leaves: list[Tensor]
    leaf_nodes: list[Node]  # what accumulates their gradients
    order: list[Node]  # the nodes in between, each before those it reads from
    wiring: tuple[int | tuple[int, int], ...]  # who reads from whom, as numbers
    sites: list[CallSite] = field(default_factory=list)  # as far as they are known
    kind: Hashable = None  # equal where everything is at the same places
    common: dict[str, Any] = field(default_factory=dict)  # what is kept for all graphs of the kind

    @cached_property
    def nodes(self) -> dict[Node, int]:
        """Their places in the order."""
        return {node: place for place, node in enumerate(self.order)}

    @cached_property
    def leaf_numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self.leaf_nodes)}

    @cached_property
    def edges(self) -> dict[Any, GradientEdge]:
        """Where the gradients of the leaves arrive."""
        ends = [GradientEdge(node, 0) for node in self.leaf_nodes]
        return dict(zip(self.leaves, ends, strict=True))


class OfKinds(dict[Hashable, _Value]):
    """By kinds of graphs; the oldest goes where a forward changes for ever."""

    MOST = 256

    def __setitem__(self, kind: Hashable, value: _Value) -> None:
        if kind not in self and len(self) >= self.MOST:
            self.pop(next(iter(self)), None)
        super().__setitem__(kind, value)


NO_GRAPH = Graph([], [], [], ())


def walk(losses: Tensor) -> Graph:
    """Follow the graph from the losses to its leaves."""
    leaves: list[Tensor] = []
    leaf_nodes: list[Node] = []
    order: list[Node] = []
    wiring: list[int | tuple[int, int]] = []
    root = losses.grad_fn
    seen: dict[Node, int] = {} if root is None else {root: 0}
    # Depth first: a node comes after all that it reads from.
    path = [] if root is None else [(root, iter(root.next_functions))]
    while path:
        node, parents = path[-1]
        for parent, output in parents:
            if parent is None:
                wiring.append(-1)
                continue
            known = len(seen)
            number = seen.setdefault(parent, known)
            wiring.append((number, output) if output else number)
            if number < known:
                continue
            following = parent.next_functions
            if not following and (leaf := getattr(parent, "variable", None)) is not None:
                leaves.append(leaf)
                leaf_nodes.append(parent)
                continue
            path.append((parent, iter(following)))
            break
        else:
            path.pop()
            order.append(node)
    order.reverse()
    return Graph(leaves, leaf_nodes, order, tuple(wiring))


def gradients_at(
    starts: Sequence[Tensor | GradientEdge],
    ends: Sequence[Any],
    cotangents: Sequence[Tensor],
    *,
    retain_graph: bool,
) -> Sequence[Tensor | None]:
    """The gradients of some tensors at tensors or edges, where they arrive."""
    if not ends:
        return ()
    once = tuple(starts), tuple(cotangents), retain_graph, False, tuple(ends), True
    return run_backward(*once, accumulate_grad=False)  # type: ignore[no-any-return]


def fingerprint(losses: Tensor, graph: Graph) -> tuple[object, ...]:
    """What decides where the batch is and which calls layers make."""
    found: list[object] = [losses.shape, losses.output_nr, graph.wiring]
    for node in graph.order:
        kind = type(node)
        found.append(kind)
        for output in node._input_metadata:
            shape = () if output.is_nested_tensor else tuple(output.shape)
            found += (shape, output.dtype)
        settings = _SETTINGS_OF.get(kind, _settings_of)
        if settings is not None:
            found.append(settings(node))
    return tuple(found)


_SETTINGS = (
    "dim dim0 dim1 dimension dims keepdim normalized_shape pad reduction repeats size stride "
    "training"
)
"""All that `mixing_rules` read beside the shapes and, of indices, their `picks_of`."""

_FACTORS = {"Addmm": ("_saved_alpha", "_saved_beta")}
"""What a `Remade` call depends on beside these."""

_SETTINGS_OF: dict[type[Node], Callable[[Any], object] | None] = {}
"""How to read them; None where there are none."""


def _settings_of(node: Node) -> object:
    name = base_name(node)
    saved = [f"_saved_{setting}" for setting in _SETTINGS.split()]
    names = [*filter(partial(hasattr, node), saved), *_FACTORS.get(name, ())]
    read: Callable[[Any], object] | None = None
    if RULES.get(name) is picking:
        read = picks_of
    elif name == "Slice":
        read = _slice
    elif names:
        values = attrgetter(*names)
        lists = any(isinstance(getattr(node, setting), list) for setting in names)
        read = (lambda n: repr(values(n))) if lists else values
    _SETTINGS_OF[type(node)] = read
    return None if read is None else read(node)


def _slice(node: Any) -> tuple[int, bool]:
    return node._saved_dim, is_block(node)


class Remade(NamedTuple):
    """A linear map without positions, the only one with its parameters."""

    place: int  # of its node in the graph's order
    input: str  # its node's name for it
    call: LinearCall  # of an earlier graph, with its input let go
    shape: torch.Size


@dataclass
class Plan:
    """What is known of the layer calls of all graphs of one kind."""

    covering: "Covering"
    read: Callable[[Graph, Tensor], list[CallSite] | None]  # None: other settings than ever
    remade: Sequence[Remade] | None  # where these are all
    opaque: Opaque  # nothing else may mix the samples

    def sites(self, graph: Graph, losses: Tensor) -> list[CallSite] | None:
        if self.remade is None:
            return self.read(graph, losses)
        sites: list[CallSite] = []
        for place, input, call, shape in self.remade:
            node = graph.order[place]
            read = call.of(getattr(node, input))
            sites.append(CallSite(read, GradientEdge(node, 0), shape, True))
        return sites


def refuse_reentrant_checkpoints(nodes: Iterable[Node]) -> None:
    """Raise where a part is recomputed by a backward pass of its own."""
    if CheckpointFunction._backward_cls in set(map(type, nodes)):
        raise RuntimeError(
            "torch.utils.checkpoint with use_reentrant=True adds to p.grad inside the backward "
            "pass: no gradient of single samples can be had. Call checkpoint(..., "
            "use_reentrant=False), with Hugging Face "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, for the same memory'
        )
