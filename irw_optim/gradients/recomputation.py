"""Activation checkpointing: who chose to pay time for memory gets the memory.

The ghost products need all layers' inputs at once; a change goes forwards part by part instead.

A forward may change the model: BatchNorm's averages, spectral norm's vectors. A plain step does so
once more as it recomputes a part; so do all passes of ours together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Value = TypeVar("_Value")

RECOMPUTES = "a backward pass changes buffers"

NOTHING = nullcontext()
"""Around a pass that computes nothing again."""


def unless_recomputed(look: Callable[[], _Value], otherwise: _Value) -> _Value:
    """A look at what nodes saved, or ``otherwise`` where that recomputes a part."""
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

    Every pass begins with those that the first one met, and leaves those that the first one left.
    What is ``known`` of the model is whether any pass changed one.
    """

    def __init__(self, model: nn.Module | None, known: dict[str, bool]) -> None:
        self.known = known
        modules = () if model is None else model.modules()
        self.buffers = [module._buffers for module in modules if module._buffers]
        self.before: list[_State] = []
        self.after: dict[int, _State] = {}

    def __enter__(self) -> None:
        if not self.before:
            self.before = [_state(buffers) for buffers in self.buffers]
        self.start_over()
        self.marks = [_marks(buffers) for buffers in self.buffers]

    def start_over(self) -> None:
        """Begin with the buffers that the first pass met."""
        for place in self.after:
            _put(self.buffers[place], self.before[place])

    def __exit__(self, *raised: object) -> None:
        for place, (buffers, marks) in enumerate(zip(self.buffers, self.marks, strict=True)):
            if place in self.after:
                _put(buffers, self.after[place])
            elif marks != _marks(buffers):
                self.known[RECOMPUTES] = True
                self.after[place] = _state(buffers)


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
