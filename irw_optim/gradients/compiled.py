"""The products of a step, compiled: functions of the tensors that its layer calls hold.

What the calls are beside these is a key, for which a function is traced and compiled once.
"""

import logging
from collections.abc import Callable, Container, Hashable, Sequence
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .ghost import GhostGradients
from .layers import LayerCall, Layout
from .protocol import Direction

if TYPE_CHECKING:
    from .engine import Engine

Product = Callable[[Any, Tensor], Direction]

MOST = 16
"""Programs of a model: two for each shape of its batches."""

_VALUES = {int, float, bool, str, type(None), torch.Size, torch.dtype, Layout}
_UNREAD = {"version", "passes_on", "hands_back"}


class CompiledGradients(GhostGradients):
    """With the products that the engine's programs give; the others as they are."""

    def __init__(self, ghost: GhostGradients, engine: "Engine") -> None:
        vars(self).update(vars(ghost))
        self.engine = engine

    @cached_property
    def apart(self) -> tuple[Hashable, list[Tensor]]:
        return taken_apart([self._factor, *self.calls])

    def restricted_to(self, parameters: Container[Tensor]) -> GhostGradients:
        return CompiledGradients(super().restricted_to(parameters), self.engine)

    def combine(self, weights: Tensor, *, release: bool = False) -> dict[Tensor, Tensor]:
        total = self._by_program(GhostGradients.combine, weights)
        return super().combine(weights, release=release) if total is None else dict(total)

    def align(self, coefficients: Tensor) -> Tensor:
        scores = self._by_program(_align, coefficients)
        return super().align(coefficients) if scores is None else scores[coefficients]

    def _by_program(self, product: Product, vector: Tensor) -> Direction | None:
        programs, found = self.engine.programs, None
        try:
            calls, held = self.apart
            tensors = [*held, vector]
            key = product, calls, vector.stride(), vector.dtype, vector.device
            if key not in programs:
                if len(programs) == MOST:
                    raise RuntimeError(f"batches of other shapes have taken all {MOST} programs")
                programs[key] = None  # for good, if what follows fails
                programs[key] = compiled(product, self, tensors)
            found = programs[key] and programs[key](tensors)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            text = f"compile=True leaves a product uncompiled, which is exact as well: {reason}"
            self.engine.tell(logging.WARNING, "uncompiled", text)
        if found is None:  # then products keep sums with the calls
            vars(self).pop("apart", None)
        return found


def _align(gradients: GhostGradients, coefficients: Tensor) -> Direction:
    return {coefficients: GhostGradients.align(gradients, coefficients)}


def taken_apart(things: list[Any]) -> tuple[Hashable, list[Tensor]]:
    """What layer calls are beside their tensors, and these, each once."""
    key: list[Any] = []
    tensors: list[Tensor] = []
    places: dict[int, int] = {}
    waiting: list[Any] = [things]
    for thing in waiting:
        kind, values = type(thing), thing
        if kind is dict:
            values = [*thing, *thing.values()]
        elif kind is slice:
            values = [thing.start, thing.stop, thing.step]
        elif isinstance(thing, LayerCall):
            read = [pair for pair in vars(thing).items() if pair[0] not in _UNREAD]
            values = [part for pair in read for part in pair]
        elif kind is not list and kind is not tuple:  # what it does may change, and no key tells
            raise TypeError(f"layer calls depend on a {kind.__name__}")
        key.append(len(values))
        for value in values:
            kind = type(value)
            if kind in _VALUES:
                key.append(value)
            elif isinstance(value, Tensor):
                if (place := places.get(id(value))) is None:
                    places[id(value)] = place = len(tensors)
                    tensors.append(value)
                key += (Tensor, place)
            else:
                key.append(kind)
                waiting.append(value)
    key += [(t.shape, t.stride(), t.dtype) for t in tensors]
    return tuple(key), tensors


def compiled(
    product: Product, gradients: GhostGradients, tensors: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], Direction]:
    """A product with the last of the tensors, compared with what it stands for."""
    from torch.fx.experimental.proxy_tensor import make_fx

    belongs: list[int] = []

    def function(*given: Tensor) -> list[Tensor]:
        copies: dict[int, Any] = {id(t): twin for t, twin in zip(tensors, given, strict=True)}
        copies |= {id(call.hands_back): None for call in gradients.calls}
        ghost = object.__new__(GhostGradients)
        ghost.calls, ghost._factor = deepcopy((gradients.calls, gradients._factor), copies)
        found = product(ghost, given[-1])
        places = {id(t): place for place, t in enumerate(given)}
        belongs[:] = [places[id(t)] for t in found]
        return [*found.values()]

    with torch.no_grad():
        run = built(make_fx(function, tracing_mode="fake")(*tensors), tensors)
        for found, expected in zip(run(*tensors), function(*tensors), strict=True):
            error = (found - expected).norm()
            if error > torch.finfo(expected.dtype).eps ** 0.5 * expected.norm():
                raise ArithmeticError(f"compiled, it differs by {error:.2g}")
    return lambda tensors: dict(zip([tensors[n] for n in belongs], run(*tensors), strict=True))


def built(graph: GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Not as a CUDA graph: its results are overwritten by the next run, and p.grad is one."""
    from torch._inductor import compile

    return compile(graph, [*tensors], {"triton.cudagraphs": False})  # type: ignore[no-any-return]
