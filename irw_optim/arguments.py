"""What counts as a number or as a truth value among arguments, in one place.

Numbers come from Python, NumPy and pandas alike, as scalars or as arrays without a dimension. The
functions give the plain Python value, which is what is kept, copied and written to checkpoints;
None stands for everything else, and whoever asked says what was expected.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np


def plain(value: object) -> object:
    """A number or truth value as Python's own; whatever else it is, unchanged.

    >>> import numpy as np
    >>> plain(np.float64(0.5)), plain(np.array(3)), plain(np.True_), plain("auto")
    (0.5, 3, True, 'auto')
    """
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value)


def as_real(value: object) -> float | None:
    """The value of a real number, NaN included; None for truth values and what is no number.

    >>> import numpy as np
    >>> as_real(1), as_real(np.float32(0.5)), as_real(True), as_real("0.5")
    (1.0, 0.5, None, None)
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def as_whole(value: object) -> int | None:
    """The value of a whole number of an integer type; None for all else, 2.0 and True included.

    >>> import numpy as np
    >>> as_whole(np.int64(2)), as_whole(2.0), as_whole(True)
    (2, None, None)
    """
    number = plain(value)
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def whole_number(name: str, value: object, least: int, expected: str = "") -> int:
    """The whole number >= ``least`` that an argument is, or an error that names it.

    A TypeError for what is no whole number, a ValueError for a smaller one; ``expected`` says in
    words what was.

    >>> whole_number("every", 0, least=1)
    Traceback (most recent call last):
    ...
    ValueError: every=0: expected a whole number >= 1
    """
    message = f"{name}={value!r}: expected {expected or f'a whole number >= {least}'}"
    if (number := as_whole(value)) is None:
        raise TypeError(message)
    if number < least:
        raise ValueError(message)
    return number


def real_number(name: str, value: object, interval: str, meaning: str = "") -> float:
    """The number in an interval that an argument is, or an error that names it.

    The interval is given as it is written, ``"(0, 1]"`` or ``"[0, inf)"``. A TypeError for what is
    no number, a ValueError for one outside and for NaN.

    >>> real_number("mix", 1.5, "[0, 1]", "the share of plain averaging")
    Traceback (most recent call last):
    ...
    ValueError: mix=1.5: expected a number in [0, 1], the share of plain averaging
    """
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


def true_or_false(name: str, value: object) -> bool:
    """True or False, or a TypeError that names the argument; 0 and 1 are neither.

    >>> true_or_false("class_balance", 1)
    Traceback (most recent call last):
    ...
    TypeError: class_balance=1: expected True or False
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}={value!r}: expected True or False")
    return flag
