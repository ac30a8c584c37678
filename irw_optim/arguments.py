"""What is asked of arguments: numbers and truth values, NumPy's or pandas' too, become Python's.

Imports nothing of the library, so that any module may raise its error.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import numpy as np


class DPGuaranteeError(RuntimeError):
    """What was asked for would run, but the privacy guarantee it reports would be false.

    Raised before any state changes: a wrong epsilon cannot be seen in the results.
    """


def plain(value: object) -> object:
    """A number or truth value as Python's; all else unchanged."""
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def as_real(value: object) -> float | None:
    """A real number, NaN included; None for truth values and what is no number."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def as_whole(value: object) -> int | None:
    """A whole number of an integer type; None for all else, 2.0 and True included."""
    number = plain(value)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def whole_number(name: str, value: object, least: int, expected: str = "") -> int:
    """A TypeError for what is no whole number, a ValueError below ``least``."""
    message = f"{name}={value!r}: expected {expected or f'a whole number >= {least}'}"
    if (number := as_whole(value)) is None:
        raise TypeError(message)
    if number < least:
        raise ValueError(message)
    return number


def real_number(name: str, value: object, interval: str, meaning: str = "") -> float:
    """A TypeError for what is no number, a ValueError outside ``"(0, inf]"``, say, and for NaN."""
    message = f"{name}={value!r}: expected a number in {interval}"
    message += f", {meaning}" if meaning else ""
    if (number := as_real(value)) is None:
        raise TypeError(message)
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(message)
    return number


def one_of(name: str, value: object, allowed: Iterable[str]) -> str:
    """The name that an argument is, or a ValueError with those that are allowed."""
    if value not in (names := list(allowed)):
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, names))}")
    return str(value)


def check_state(name: str, state: object, *keys: str) -> None:
    """A TypeError for what is no dict, a ValueError for one without these keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{name}={state!r}: expected what state_dict() returned")
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{name} has no {missing[0]!r}: expected what state_dict() returned")


def true_or_false(name: str, value: object, meaning: str = "") -> bool:
    """A TypeError for all else, 0 and 1 included."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}={value!r}: expected True or False{meaning}")
    return flag
