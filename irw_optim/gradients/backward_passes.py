"""Backward passes from one vector of losses: one that hooks on activations hear, others that not.

Hooks hear that of the mean, to the layers' outputs; or, where autograd finishes some parameters,
the weighted one. A hook that changes what it hears (a reversal, a clipping) has to hear every pass,
which comparing two finds out.

With activation checkpointing a pass computes the forward again, part by part. That may change the
model (BatchNorm's averages, spectral norm's vectors), in a plain step once more; so do all passes
of ours together.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.overrides import TorchFunctionMode

from irw_optim.restored import randomness_restored
from irw_optim.torch_internals import silent

from .coverage import equal
from .graph import Graph, gradients_at
from .mixing import is_foreign
from .places import places_of
from .protocol import Direction
from .pushforward import NoPushForwardError, pull_back, push_forward

_Value = TypeVar("_Value")

_LARGEST = 2**25 - 2**13
"""Bytes: what glibc counts as small at most, 32 MiB, with what it puts around."""

End: TypeAlias = Tensor | GradientEdge
"""A leaf, or an edge of the graph."""

logger = logging.getLogger("irw_optim")

RECOMPUTES = "a backward pass changes buffers"

NOTHING = nullcontext()
"""Around a pass that computes nothing again."""

HOOKS_CHANGE = "hooks change gradients"


def keep_freed_memory() -> None:
    """Have the host's allocator keep what a pass frees, up to 64 MiB, for the next one.

    Passes allocate above the graph that stays. glibc returns that end of the heap at every turn, to
    get it anew page by page, until a large block has once been freed: none is ever written here.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")


class BackwardPasses:
    """From the losses to edges of their graph, each in ``one_forward``."""

    def __init__(
        self,
        losses: Tensor,
        graph: Graph,
        known: dict[str, bool],
        one_forward: AbstractContextManager[object] = NOTHING,
        model: nn.Module | None = None,
    ) -> None:
        self.losses = losses
        self.graph = graph
        self.known = known
        self.one_forward = one_forward
        self.model = model
        self.hooks_ran = False  # whether they have heard a pass of these losses

    def without_hooks(self, ends: Sequence[End], weights: Tensor) -> Sequence[Tensor | None]:
        """The gradient of <weights, losses>, (B,) both; hooks run where they change it."""
        if self.known.get(HOOKS_CHANGE) or places_of(self.graph).nested:
            return self.with_hooks(ends, weights)
        cotangent, edges = weights.to(self.losses.dtype), self.graph.edges
        found: list[Any] = [edges.get(end, end) for end in ends]
        with self.one_forward:
            return pull_back(self.losses, cotangent, found, self.graph)

    def push(self, direction: Direction) -> Tensor:
        if self.known.get(HOOKS_CHANGE):
            raise NoPushForwardError("hooks on activations have a say in it")
        if places_of(self.graph).nested:
            raise NoPushForwardError("nested tensors")
        numbers = {p: n for n, p in enumerate(self.graph.leaves)}
        changes = {numbers[p]: v.to(p.dtype) for p, v in direction.items() if p in numbers}
        unit: Tensor | None = None
        if changes and torch.float16 in places_of(self.graph).dtypes:  # up to 65504
            sizes = [change.abs().max().float() for change in changes.values() if change.numel()]
            unit = torch.stack(sizes).max().clamp(min=1e-30)
            changes = {n: change / unit for n, change in changes.items()}
        with self.one_forward:
            pushed = push_forward(self.losses, changes, self.graph)
        return pushed if unit is None else pushed * unit

    def with_hooks(
        self, ends: Sequence[End], weights: Tensor, *, retain_graph: bool = True
    ) -> Sequence[Tensor | None]:
        """The same by autograd's own engine."""
        self.hooks_ran = True
        graph = self.graph
        found = [graph.edges.get(end, end) for end in ends]
        with self.one_forward:
            return backward_to(found, self.losses, weights, graph.leaves, retain_graph=retain_graph)

    def compare_hooks(
        self, edges: Sequence[End], weights: Tensor, leaves: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """One that is heard, compared at the leaves with one that is not."""
        chance = randomness_restored(leaf.device for leaf in leaves)
        with _nothing_added(self.model, self.graph.order), chance:
            found = self.with_hooks([*edges, *leaves], weights)
        heard = found[len(edges) :]
        try:
            same = equal(leaves, heard, self.without_hooks(leaves, weights))
            alike = same or equal(leaves, heard, self.with_hooks(leaves, weights))
        except (AttributeError, AssertionError, LookupError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(f"{_ONCE}; the second one raised {error!r}") from error
        if not alike:
            raise RuntimeError(_ONCE)
        if not (same or self.known.get(HOOKS_CHANGE)):
            self.known[HOOKS_CHANGE] = True
            logger.info(
                "a hook on an activation changes the gradient: it is called in every backward pass "
                "that the weights need"
            )
        return found[: len(edges)]


_ONCE = (
    "two backward passes through one graph differ, and weights take several: expected hooks that "
    "stay until the next forward, functions that neither free what they saved nor write to it, and "
    "checkpoints without the context_fn that selects what to save"
)


@contextmanager
def _nothing_added(model: nn.Module | None, nodes: Iterable[Node]) -> Iterator[None]:
    """Raise where a function in Python writes to ``p.grad``, as reversible blocks do."""
    foreign = {node.name() for node in nodes if is_foreign(node)}
    parameters = [] if model is None or not foreign else [*model.parameters()]
    before = _gradients_of(parameters)
    yield
    after = _gradients_of(parameters)
    if any(a is not b or v != w for (a, v), (b, w) in zip(before, after, strict=True)):
        for p, (gradient, _) in zip(parameters, before, strict=True):
            p.grad = gradient
        raise RuntimeError(
            f"{', '.join(sorted(foreign))}: its backward calls backward() on a part of the model, "
            "which adds to p.grad: no gradient of single samples can be had. Turn it off "
            "(reversible layers often have an option), take torch.utils.checkpoint with "
            "use_reentrant=False, or have it return what torch.autograd.grad computes"
        )


def _gradients_of(parameters: Iterable[Tensor]) -> list[tuple[Tensor | None, int | None]]:
    return [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]


def backward_to(
    ends: Any, losses: Tensor, weights: Tensor, leaves: Iterable[Tensor], *, retain_graph: bool
) -> Sequence[Tensor | None]:
    """Autograd's own pass, unheard by the leaves, whose hooks belong to the final one."""
    with silent(leaves), torch.enable_grad():
        return gradients_at([losses], ends, [weights.to(losses.dtype)], retain_graph=retain_graph)


def edges_aside(graph: Graph, rest: Sequence[Tensor]) -> list[GradientEdge]:
    """Layers off the way to the rest, whose hooks hear the pass, too."""
    if not graph.sites:
        return []
    on_the_way = {graph.edges[leaf].node for leaf in rest}
    for node in reversed(graph.order):
        if any(parent in on_the_way for parent, _ in node.next_functions):
            on_the_way.add(node)
    return [site.edge for site in graph.sites if site.edge.node not in on_the_way]


def unless_recomputed(look: Callable[[], _Value], otherwise: _Value) -> _Value:
    """A look at what nodes saved, or ``otherwise`` where that recomputes a part.

    Who chose to pay time for memory gets it: the products need all layers' inputs at once.
    """
    try:
        with _NoRecomputation():
            return look()
    except _RecomputedError:
        return otherwise


class _RecomputedError(Exception):
    """A part began to be computed again."""


_MAKE_NOTHING = frozenset(
    {Tensor.view, Tensor.unsqueeze, Tensor.__getitem__, torch._C._set_grad_enabled}
)
"""A look takes some with gradients: a view tells what it is a view of."""


class _NoRecomputation(TorchFunctionMode):
    """Stops a recomputation: it wants gradients, and a look does not."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled() and function not in _MAKE_NOTHING:
            raise _RecomputedError
        return function(*args, **(kwargs or {}))


_State: TypeAlias = list[tuple[str, Tensor, Tensor]]
"""Of each buffer: its name, itself, and its values."""


class OneForward(AbstractContextManager[None]):
    """A model's buffers around each backward pass of one loss that may compute its forward again.

    Every pass begins with those that the first one met; all but that one leave them as they were.
    What is ``known`` of the model is whether any pass changed one.
    """

    def __init__(self, model: nn.Module | None, known: dict[str, bool]) -> None:
        self.known = known
        modules = () if model is None else model.modules()
        self.buffers = [module._buffers for module in modules if module._buffers]
        self.before: list[_State] = []
        self.changed: set[int] = set()

    def __enter__(self) -> None:
        if not self.before:
            self.before = [_state(buffers) for buffers in self.buffers]
        self.found = {place: _state(self.buffers[place]) for place in self.changed}
        self.start_over()
        self.marks = [_marks(buffers) for buffers in self.buffers]
        self.held = [dict(buffers) for buffers in self.buffers]  # or others would get their ids

    def start_over(self) -> None:
        """Begin with the buffers that the first pass met."""
        for place in self.changed:
            _put(self.buffers[place], self.before[place])

    def __exit__(self, *raised: object) -> None:
        for place, (buffers, marks) in enumerate(zip(self.buffers, self.marks, strict=True)):
            if place in self.found:
                _put(buffers, self.found[place])
            elif marks != _marks(buffers):
                self.known[RECOMPUTES] = True
                self.changed.add(place)


def _marks(buffers: dict[str, Tensor | None]) -> list[tuple[int, int]]:
    return [(id(buffer), buffer._version) for buffer in buffers.values() if _is_counted(buffer)]


def _state(buffers: dict[str, Tensor | None]) -> _State:
    return [(name, b, b.detach().clone()) for name, b in buffers.items() if _is_counted(b)]


def _is_counted(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not buffer.is_inference()


def _put(buffers: dict[str, Tensor | None], state: _State) -> None:
    """Past autograd's count of changes: a graph may have saved a buffer."""
    for name, buffer, values in state:
        buffers[name] = buffer
        buffer.data.copy_(values)
