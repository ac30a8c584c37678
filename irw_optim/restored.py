"""Puts back what a forward may change: buffers, gradients, attributes, and sources of chance."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Undo = Callable[[], object]

_OF_MODULES = frozenset(vars(nn.Module()))  # no state of a forward


@contextmanager
def restored(*modules: nn.Module) -> Iterator[None]:
    """Put back, after the block, what these modules may change."""
    parameters = [p for module in modules for p in module.parameters()]
    with randomness_restored(p.device for p in parameters), ExitStack() as undo:
        for p in parameters:
            undo.callback(setattr, p, "grad", p.grad)
        for module in modules:
            for action in undo_state(module):
                undo.callback(action)
        yield


@contextmanager
def randomness_restored(
    devices: Iterable[torch.device] = (), *, numpy: bool = True
) -> Iterator[Any]:
    """Put back, after the block, the global generators of Python, NumPy, and torch on ``devices``.

    NumPy's state, which takes long to save, is yielded.
    """
    with ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        of_numpy = np.random.get_state() if numpy else None
        if of_numpy is not None:
            undo.callback(np.random.set_state, of_numpy)
        for device in set(devices):
            if device.type not in ("cpu", "meta"):
                module: Any = torch.get_device_module(device)
                undo.callback(module.set_rng_state, module.get_rng_state(device), device)
        yield of_numpy


def undo_state(module: nn.Module, *, by_version: bool = False) -> Iterator[Undo]:
    """What puts back the buffers and attributes of a module and of the modules in it.

    With ``by_version`` autograd counts a write to a tensor only if it counted a change of it, as it
    does not of ``running_mean`` and by ``.data``: an earlier graph may need it as it is.
    """
    for part in module.modules():
        yield from undo_own_state(part, by_version)


def undo_own_state(part: nn.Module, by_version: bool = False) -> Iterator[Undo]:
    """The same of one module alone."""
    yield _undo_dict(vars(part))
    yield _undo_dict(part._buffers)
    own = [value for name, value in vars(part).items() if name not in _OF_MODULES]
    for value in (*own, *part._buffers.values()):
        if (undo := undo_inside(value, by_version)) is not None:
            yield undo


def undo_inside(value: Any, by_version: bool = False) -> Undo | None:
    """The same of an attribute's value; None where nothing is known to change."""
    if isinstance(value, Tensor):
        plain = not (value.requires_grad or value.is_inference())
        return _undo_tensor(value, by_version) if plain else None
    if isinstance(value, torch.Generator | np.random.RandomState):
        state: Any = value.get_state()
        return partial(value.set_state, state)
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, dict):
        return _undo_dict(value)
    if isinstance(value, list | deque | set):
        return partial(_refill, value, copy(value))
    if isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, ModuleType):
        return _undo_dict(vars(value))
    return None


def _undo_dict(value: dict[Any, Any]) -> Undo:
    content = dict(value)

    def undo() -> None:
        if value.keys() != content.keys() or any(value[k] is not v for k, v in content.items()):
            _refill(value, content)

    return undo


def _refill(value: Any, content: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, list | deque) else value.update)(content)


def _undo_tensor(tensor: Tensor, by_version: bool) -> Undo:
    values, version = tensor.detach().clone(), tensor._version

    def undo() -> None:
        counted = not by_version or tensor._version != version
        with torch.no_grad():
            if counted:
                tensor.copy_(values)
            elif 0 not in tensor.stride():  # one that is expanded cannot be written to
                tensor.data.copy_(values)

    return undo
