"""Passes through a model that leave no trace: what a forward may change, as it was before.

A fair comparison of two passes starts both from one state: buffers and gradients, what the modules
keep in attributes of their own (a counter, a running mean), and every source of chance in reach
(torch's generators, ``random``, NumPy, generators that a module holds).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Undo = Callable[[], object]

_OF_MODULES = frozenset(vars(nn.Module()))
"""What every module has: parameters, hooks and the like are no state of a forward."""


@contextmanager
def restored(*modules: nn.Module) -> Iterator[None]:
    """Put back, after the block, what a pass through these modules may change.

    Args:
        *modules: the model, and the criterion.
    """
    devices = {p.device for module in modules for p in module.parameters()}
    undo = [*_chance(devices)]
    for module in (m for top in modules for m in top.modules()):
        undo += _state_of(module)
    try:
        yield
    finally:
        with torch.no_grad():
            for action in undo:
                action()


def _chance(devices: set[torch.device]) -> Iterator[Undo]:
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield lambda: random.setstate(of_python)
    yield lambda: np.random.set_state(of_numpy)
    yield lambda: torch.set_rng_state(of_torch)
    for device in devices:
        if device.type not in ("cpu", "meta"):
            yield _of_device(device)


def _of_device(device: torch.device) -> Undo:
    module: Any = torch.get_device_module(device)
    state = module.get_rng_state(device)
    return lambda: module.set_rng_state(state, device)


def _state_of(module: nn.Module) -> Iterator[Undo]:
    for parameter in module.parameters(recurse=False):
        yield _gradient_of(parameter)
    buffers = dict(module._buffers)
    for buffer in buffers.values():
        if buffer is not None:
            yield _values_of(buffer)
    yield lambda: module._buffers.update(buffers)
    own = {k: v for k, v in vars(module).items() if k not in _OF_MODULES}
    for value in own.values():
        if (undo := _inside(value)) is not None:
            yield undo
    yield lambda: _reset_attributes(module, own)


def _reset_attributes(module: nn.Module, own: dict[str, Any]) -> None:
    for name in vars(module).keys() - own.keys() - _OF_MODULES:
        del vars(module)[name]
    vars(module).update(own)


def _inside(value: Any) -> Undo | None:
    """How to restore what can change inside an attribute; None where nothing is known to."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        bit_state = bits.state
        return lambda: setattr(bits, "state", bit_state)
    if isinstance(value, np.random.RandomState):
        old = value.get_state()
        return lambda: value.set_state(old)
    if isinstance(value, random.Random):
        before = value.getstate()
        return lambda: value.setstate(before)
    if isinstance(value, Tensor):
        return None if value.requires_grad else _values_of(value)
    if isinstance(value, (list, dict, set)):
        content = copy(value)
        return lambda: _refill(value, content)
    return None


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)


def _gradient_of(parameter: Tensor) -> Undo:
    gradient = parameter.grad
    return lambda: setattr(parameter, "grad", gradient)


def _values_of(tensor: Tensor) -> Undo:
    values = tensor.detach().clone()
    return lambda: tensor.copy_(values)
