"""How a criterion is called once more, so that nobody can tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from irw_optim.criterion._rules import forward_of
from irw_optim.restored import randomness_restored, undo_own_state, undo_state


def value_of_its_own(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What the criterion itself returns, detached; the next call finds all as this one did.

    Gradients stay enabled: a criterion may differentiate on its way (a penalty on a gradient).
    Whether it draws from NumPy is looked at now and then, until it has: to save and restore that
    state takes longer than all the rest.
    """
    looks = is_due(criterion, _uses) or criterion in _draw_from_numpy
    with rehearsal(criterion, (*args, *kwargs.values()), numpy=looks) as saved:
        own = forward_of(criterion)(*args, **kwargs)
        if saved is not None and not _same(saved, np.random.get_state()):
            _draw_from_numpy.add(criterion)
    return own.detach() if isinstance(own, Tensor) else own


_uses: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_draw_from_numpy: WeakSet[nn.Module] = WeakSet()


def is_due(criterion: nn.Module, uses: WeakKeyDictionary[nn.Module, int]) -> bool:
    """Counts a use, and tells whether it is the 1st, 2nd, 4th, 8th, ..."""
    count = uses[criterion] = uses.get(criterion, 0) + 1
    return not count & (count - 1)


@contextmanager
def rehearsal(
    criterion: nn.Module, arguments: Iterable[object], *, numpy: bool = True
) -> Iterator[Any]:
    """Afterwards random states, and the counters and buffers of the criterion, are as before.

    Attributes are restored, with what is in the lists, dicts, tensors, random generators and plain
    objects that they name; and so are those of other modules that it calls (a BatchNorm of the
    model). What a criterion changes elsewhere (a file, a global) stays changed. With ``numpy``, the
    state of NumPy's global generator is among them, and is what is yielded.
    """
    undo = list(undo_state(criterion, by_version=True))
    known, here = set(criterion.modules()), get_ident()

    def before_a_call(module: nn.Module, _: object) -> None:
        if module not in known and get_ident() == here:
            known.add(module)
            undo.extend(undo_own_state(module, by_version=True))

    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    if torch.cuda.is_initialized():  # where the tensors may be that a dict holds
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    with randomness_restored(devices, numpy=numpy) as saved:
        heard = register_module_forward_pre_hook(before_a_call)
        try:
            yield saved
        finally:
            heard.remove()
            for restore in undo:
                restore()


def _same(state: Any, other: Any) -> bool:
    """Of two states of NumPy's global generator."""
    return state[2:] == other[2:] and np.array_equal(state[1], other[1])
