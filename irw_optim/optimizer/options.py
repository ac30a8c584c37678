"""The options of an optimizer as a checkpoint holds them, so that two runs can be compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("irw_optim")


def described(value: Any) -> Any:
    """An option as plain data, which two runs write alike.

    >>> described(0.3), described(len), described(object())
    (0.3, 'len', 'object')
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None) or repr(value)
    return type(value).__qualname__ if " at 0x" in name else name


def report_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Log the options in which a checkpoint differs from the optimizer that takes it."""
    for name, value in now.items():
        if before.get(name, value) != value:
            logger.warning(
                "the checkpoint was made with %s=%r; training goes on with %r",
                *(name, before[name], value),
            )
