"""How a criterion is called: unreduced, with its own reduction, or so that nobody can tell."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn


def unreduced(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the criterion returns with ``reduction="none"``; its own reduction is put back."""
    attributes = vars(criterion)  # nn.Module's __setattr__ takes as long as a small loss
    own = attributes.get("reduction")
    attributes["reduction"] = "none"
    try:
        # Not criterion(...): that would run its hooks, and this may be called from one of them.
        elements: Tensor = criterion.forward(*args, **kwargs)
    finally:
        if own is None:
            del attributes["reduction"]  # it was the class's
        else:
            attributes["reduction"] = own
    return elements


def value_of_its_own(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What the criterion itself returns, detached; the next call finds all as this one did.

    Gradients stay enabled: a criterion may differentiate on its way (a penalty on a gradient).
    Whether it draws from NumPy is looked at at uses 1, 2, 4, 8, ..., until it has: to save and
    restore that state takes longer than all the rest.
    """
    uses = _uses[criterion] = _uses.get(criterion, 0) + 1
    looks = criterion in _draw_from_numpy or not uses & (uses - 1)
    with rehearsal(criterion, (*args, *kwargs.values()), numpy=looks) as saved:
        own = forward_of(criterion)(*args, **kwargs)
        if saved is not None and not _same(saved, np.random.get_state()):
            _draw_from_numpy.add(criterion)
    return own.detach() if isinstance(own, Tensor) else own


_uses: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_draw_from_numpy: WeakSet[nn.Module] = WeakSet()


def forward_of(criterion: nn.Module) -> Callable[..., Any]:
    """The criterion's own forward: what stands in for one names it ``original``."""
    return getattr(criterion.forward, "original", criterion.forward)


@contextmanager
def rehearsal(
    criterion: nn.Module, arguments: Iterable[object], *, numpy: bool = True
) -> Iterator[Any]:
    """Afterwards random states, and the counters and buffers of the criterion, are as before.

    Attributes are restored, with what is in the lists, dicts, tensors, random generators and plain
    objects that they name. What a criterion changes elsewhere (a file, a global) stays changed.

    Args:
        criterion: What is called inside.
        arguments: What it is called with.
        numpy: Whether the state of NumPy's global generator is among them; it is what is yielded.
    """
    undo = [restore for module in criterion.modules() for restore in _restores(module)]
    python, saved = random.getstate(), np.random.get_state() if numpy else None
    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    if torch.cuda.is_initialized():  # where the tensors may be that a dict holds
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(()))
        for device in devices:
            if device.type not in ("cpu", "meta"):
                fork = torch.random.fork_rng([device], device_type=device.type)
                forks.enter_context(fork)
        try:
            yield saved
        finally:
            random.setstate(python)
            if saved is not None:
                np.random.set_state(saved)
            for restore in undo:
                restore()


def _same(state: Any, other: Any) -> bool:
    """Of two states of NumPy's global generator."""
    return state[2:] == other[2:] and np.array_equal(state[1], other[1])


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Tables of hooks and the like, which no forward changes; they take as long as a small loss."""


def _restores(module: nn.Module) -> Iterator[Callable[[], None]]:
    attributes = vars(module)
    yield _restore_dict(attributes)
    yield _restore_dict(module._buffers)
    own = [value for name, value in attributes.items() if name not in _OF_EVERY_MODULE]
    for value in (*own, *module._buffers.values()):
        if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.is_inference()):
            continue  # the one is the optimizer's to change, the other nobody's
        if isinstance(value, Tensor):
            yield _restore_tensor(value)
        elif isinstance(value, dict):
            yield _restore_dict(value)
        elif isinstance(value, list | deque):
            yield _restore_list(value)
        elif isinstance(value, torch.Generator):
            yield _restore_generator(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            yield _restore_dict(vars(value))


def _restore_dict(value: dict[Any, Any]) -> Callable[[], None]:
    saved = dict(value)

    def restore() -> None:
        if value.keys() != saved.keys() or any(value[name] is not v for name, v in saved.items()):
            value.clear()
            value.update(saved)

    return restore


def _restore_list(value: list[Any] | deque[Any]) -> Callable[[], None]:
    saved = list(value)

    def restore() -> None:
        value.clear()
        value.extend(saved)

    return restore


def _restore_tensor(value: Tensor) -> Callable[[], None]:
    saved, version = value.detach().clone(), value._version

    def restore() -> None:
        if value._version != version:  # else an earlier graph may need it as it is
            with torch.no_grad():
                value.copy_(saved)

    return restore


def _restore_generator(value: torch.Generator) -> Callable[[], None]:
    saved = value.get_state()

    def restore() -> None:
        value.set_state(saved)

    return restore
