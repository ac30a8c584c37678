"""Hooks on leaves belong to the gradient that counts, and wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def silent(leaves: Iterable[Tensor]) -> Iterator[None]:
    """The leaves' hooks are not called."""
    hooks = [p._backward_hooks for p in leaves if p._backward_hooks]
    saved = [(table, dict(table)) for table in hooks]
    for table in hooks:
        table.clear()
    try:
        yield
    finally:
        for table, entries in saved:
            table.update(entries)
