"""Activation checkpointing: who chose to pay time for memory gets the memory.

What the forward did not keep is computed again in each backward pass, a part of the model at a
time. The ghost products need the inputs of all layers at once, which is all that was spared. A
change goes forwards part by part instead: G^T c by one pass, and G (G^T c) by another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Value = TypeVar("_Value")


def unless_recomputed(look: Callable[[], _Value], otherwise: _Value) -> Callable[[], _Value]:
    """The look, or something else where it would have a part of the forward computed again.

    Args:
        look: reads what nodes saved, without gradients.
        otherwise: what is found then.
    """

    def careful() -> _Value:
        try:
            with _NoRecomputation():
                return look()
        except _RecomputedError:
            return otherwise

    return careful


class _RecomputedError(Exception):
    """A part of the forward began to be computed again."""


_MAKE_NOTHING = frozenset(
    {Tensor.view, Tensor.unsqueeze, Tensor.__getitem__, torch._C._set_grad_enabled}
)
"""Of these a look may take some with gradients: a view tells what it is a view of."""


class _NoRecomputation(TorchFunctionMode):
    """Stops a recomputation where it makes a tensor: it wants gradients, and a look does not."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled() and function not in _MAKE_NOTHING:
            raise _RecomputedError
        return function(*args, **(kwargs or {}))
