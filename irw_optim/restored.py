"""Puts back what a forward may change: buffers, gradients, attributes, and sources of chance."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
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


def undo_own_state(part: nn.Module, by_version: bool = False, depth: int = 3) -> Iterator[Undo]:
    """The same of one module alone."""
    yield _undo_dict(vars(part))
    if isinstance(part._buffers, dict):  # a ScriptModule's is a view of its own
        yield _undo_dict(part._buffers)
    own = [value for name, value in vars(part).items() if name not in _OF_MODULES]
    for value in (*own, *part._buffers.values()):
        yield from undo_inside(value, by_version, depth)


def undo_inside(value: Any, by_version: bool = False, depth: int = 0) -> Iterator[Undo]:
    """The same of an attribute's value, and of what is in it down to a ``depth``."""
    inside: Iterable[Any] = ()
    if type(value).__module__.startswith("irw_optim"):  # what is attached
        return
    if isinstance(value, Tensor):
        if not (value.requires_grad or value.is_inference()):
            yield _undo_tensor(value, by_version)
    elif isinstance(value, np.ndarray):
        if value.flags.writeable:
            yield partial(np.copyto, value, value.copy())
    elif isinstance(value, torch.Generator | np.random.RandomState):
        yield partial(value.set_state, value.get_state())  # type: ignore[arg-type]
    elif isinstance(value, np.random.Generator):
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, dict):
        yield _undo_dict(value)
        inside = value.values()
    elif isinstance(value, list | deque | set):
        yield partial(_refill, value, copy(value))
        inside = value
    elif isinstance(value, tuple):
        inside = value
    elif isinstance(value, nn.Module):
        if depth:
            yield from undo_own_state(value, by_version, depth - 1)
    elif isinstance(value, partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        inside = (value.__self__,)
    elif isinstance(value, FunctionType):
        inside = []
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # of an empty one
                inside.append(cell.cell_contents)
                yield partial(setattr, cell, "cell_contents", inside[-1])
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, ModuleType):
        yield _undo_dict(vars(value))
        inside = vars(value).values()
    for part in islice(inside, PARTS if depth else 0):
        size = getattr(part, "nbytes", 0)
        if not (isinstance(size, int) and size >= BYTES):  # of a class or a storage it is no number
            yield from undo_inside(part, by_version, depth - 1)


PARTS, BYTES = 2**12, 2**24
"""So many parts of a value are looked at, none of so many bytes."""


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
