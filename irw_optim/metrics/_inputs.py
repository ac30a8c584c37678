"""What a user may hand in, checked and turned into numpy arrays of shape (N,)."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
ArrayLike: TypeAlias = Tensor | npt.ArrayLike
GroupsLike: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
"""One column (N,), several (N, c), or columns by name: a mapping or a pandas DataFrame."""


def as_array(values: ArrayLike) -> Array:
    """Any tensor, list, array or pandas column as a numpy array on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
    array = np.asarray(values)
    if array.dtype.kind in "US" and not isinstance(values, np.ndarray):
        return np.asarray(values, dtype=object)  # numpy would turn NaN into the string "nan"
    return array


def missing(array: Array) -> Array:
    """Where (N,) has no value: None, NaN, NaT and pandas.NA, which are not equal to themselves."""
    if array.dtype != object:
        return np.asarray(array != array)

    def known(value: object) -> bool:
        same: object = value == value  # NA where it is that
        return value is not None and isinstance(same, bool | np.bool_) and bool(same)

    return np.array([not known(value) for value in array], dtype=bool)


def as_vector(name: str, values: ArrayLike, each: str, mend: str = "") -> Array:
    """``values`` as (N,), N >= 1, nothing missing; ``each`` says what an entry is."""
    array = as_array(values)
    if array.ndim != 1:
        raise ValueError(
            f"{name} has shape {array.shape}: expected (N,), one {each} a sample{mend}"
        )
    if not len(array):
        raise ValueError(f"{name} is empty: expected one {each} a sample")
    gaps = missing(array)
    if gaps.any():
        raise ValueError(
            f"{name} has no value for {gaps.sum()} of {len(array)} samples, the first at "
            f"{gaps.argmax()}: expected one {each} a sample; leave these samples out, or give them "
            "a value of their own"
        )
    # Objects (pandas' strings) are slow to compare and cannot always be sorted.
    return np.asarray(array.tolist()) if array.dtype == object else array


def as_losses(losses: ArrayLike) -> npt.NDArray[np.float64]:
    """Per-sample losses as float64, (N,), finite."""
    array = as_vector("losses", losses, "loss")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"losses has dtype {array.dtype}: expected numbers, one loss a sample")
    if not np.isfinite(array).all():
        raise ValueError(
            f"losses[{np.isinf(array).argmax()}] is infinite: expected finite losses; look for "
            "log(0) in the criterion, or leave these samples out"
        )
    return array.astype(np.float64)


def as_classes(name: str, values: ArrayLike) -> Array:
    """Class labels, (N,): numbers without fractions, or strings."""
    array = as_vector(name, values, "class", "; of scores, scores.argmax(-1)")
    if array.dtype.kind == "f" and (array != np.round(array)).any():
        first = int((array != np.round(array)).argmax())
        raise ValueError(
            f"{name}[{first}]={array[first]:g} is no class: expected class labels; of scores, "
            f"{name} = (scores > 0.5) or scores.argmax(-1)"
        )
    return array


def as_predictions(y_true: ArrayLike, y_pred: ArrayLike) -> tuple[Array, Array]:
    """True and predicted classes of the same samples, comparable with each other."""
    true, predicted = as_classes("y_true", y_true), as_classes("y_pred", y_pred)
    check_lengths(y_true=true, y_pred=predicted)
    if (true.dtype.kind in "US") != (predicted.dtype.kind in "US"):
        raise TypeError(
            f"y_true has dtype {true.dtype} and y_pred {predicted.dtype}: expected both to be "
            "strings, or both numbers, so that a right prediction equals its label"
        )
    return true, predicted


def as_columns(groups: GroupsLike) -> dict[str, Array]:
    """The columns of ``groups`` by name; without names of their own, group, or group_0, ..."""
    if isinstance(groups, Mapping) or (hasattr(groups, "columns") and hasattr(groups, "items")):
        columns = [(str(n), f"groups[{str(n)!r}]", column) for n, column in groups.items()]
        given = "groups has no column"
    elif (array := as_array(groups)).ndim == 2:
        columns = [(f"group_{i}", f"groups[:, {i}]", column) for i, column in enumerate(array.T)]
        given = f"groups has shape {array.shape}"
    else:
        return {"group": as_vector("groups", array, "group")}
    if not columns:
        raise ValueError(f"{given}: expected one column or more")
    return {name: as_vector(named, column, "group") for name, named, column in columns}


def check_numbers(name: str, array: Array) -> None:
    """Raise unless ``array``, (N, ...), holds finite numbers."""
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}: expected numbers; encode categories")
    broken = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if broken.any():
        raise ValueError(
            f"{name}[{broken.argmax()}] has NaN or infinity: fill it, or leave the sample out"
        )


def check_lengths(**arrays: Sized) -> None:
    """Raise unless all have as many samples as the first."""
    (first, reference), *others = arrays.items()
    for name, array in others:
        if len(array) != len(reference):
            raise ValueError(
                f"{first} has {len(reference)} samples and {name} has {len(array)}: "
                "expected the same samples in the same order"
            )
