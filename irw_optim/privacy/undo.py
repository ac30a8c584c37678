"""All or nothing: what fails on the way leaves no trace of the way.

Opacus hooks the model first and raises later, and a second call would then find a model that is
half private. So everything that making a training private writes to is noted before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["undone_on_error"]


@contextmanager
def undone_on_error(objects: Iterable[object]) -> Iterator[None]:
    """Give the objects their attributes back if the block raises.

    Dictionaries and lists among the attributes (tables of hooks, say) stay the same ones, with
    their contents of before.

    Args:
        objects: modules, parameters, optimizers; those without attributes are passed over.

    >>> from torch import nn
    >>> layer = nn.Linear(1, 1)
    >>> try:
    ...     with undone_on_error([layer]):
    ...         layer.note = 1
    ...         _ = layer.register_forward_hook(print)
    ...         raise RuntimeError
    ... except RuntimeError:
    ...     hasattr(layer, "note"), len(layer._forward_hooks)
    (False, 0)
    """
    undo = [_restoring(vars(thing)) for thing in objects if hasattr(thing, "__dict__")]
    try:
        yield
    except BaseException:
        for restore in undo:
            restore()
        raise


def _restoring(attributes: dict[str, Any]) -> Callable[[], None]:
    before = dict(attributes)
    tables = [(value, value.copy()) for value in before.values() if isinstance(value, dict | list)]

    def restore() -> None:
        attributes.clear()
        attributes.update(before)
        for table, contents in tables:
            table.clear()
            table.update(contents) if isinstance(table, dict) else table.extend(contents)

    return restore
