"""How groups fare, and the losses are spread; what users hand in, as numpy arrays."""

import warnings
from collections.abc import Hashable, Mapping, Sized
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from irw_optim.weighting import worst_off_count
from irw_optim.weighting.weights import check_alpha

Array: TypeAlias = npt.NDArray[Any]
ArrayLike: TypeAlias = Tensor | npt.ArrayLike
GroupsLike: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
"""One column (N,), several (N, c), or columns by name: a mapping or a pandas DataFrame."""

Group: TypeAlias = Hashable
"""A value of the one column of groups, or a tuple with a value of each."""


def group_accuracy(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> dict[Group, float]:
    """Share of right predictions inside each group that somebody is in.

    Args:
        y_true: (N,) class labels, numbers or strings.
        y_pred: (N,) predicted classes.
        groups: (N,) one column; (N, c) several, which are intersected; or {name: (N,)}, also as a
            DataFrame.

    Returns:
        {group: accuracy in [0, 1]}, sorted by group; with several columns a group is a tuple.

    Raises:
        TypeError: labels and predictions of different kinds.
        ValueError: lengths that differ, empty input, missing values, predictions that are scores.

    >>> y_true, y_pred, sex, old = [1, 0, 1, 1], [1, 0, 0, 1], ["f", "f", "m", "m"], [0, 1, 0, 1]
    >>> group_accuracy(y_true, y_pred, sex)
    {'f': 1.0, 'm': 0.5}
    >>> group_accuracy(y_true, y_pred, {"sex": sex, "old": old})
    {('f', 0): 1.0, ('f', 1): 1.0, ('m', 0): 0.0, ('m', 1): 1.0}
    """
    true, predicted = as_predictions(y_true, y_pred)
    columns = as_columns(groups)
    for column in columns.values():
        check_lengths(y_true=true, groups=column)
    names, member = intersect(columns)
    shares = np.bincount(member, weights=true == predicted) / np.bincount(member)
    return dict(zip(names, shares.tolist(), strict=True))


def worst_group_accuracy(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> float:
    """The accuracy of the group that fares worst, min_g acc_g; arguments of `group_accuracy`.

    >>> worst_group_accuracy([1, 0, 1, 1], [1, 0, 0, 1], groups=["f", "f", "m", "m"])
    0.5
    """
    return min(group_accuracy(y_true, y_pred, groups).values())


def mad(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> float:
    """MAD, the largest gap between group accuracies; arguments of `group_accuracy`.

    >>> mad([1, 0, 1, 1], [1, 0, 0, 1], groups=["f", "f", "m", "m"])
    0.5
    """
    accuracies = group_accuracy(y_true, y_pred, groups).values()
    return max(accuracies) - min(accuracies)


def tad(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> float:
    """TAD, sum_g ``|acc_g - acc|`` with the accuracy acc of all; arguments of `group_accuracy`.

    More groups make a larger sum: compare only between models on the same groups.

    >>> tad([1, 0, 1, 1], [1, 0, 0, 1], groups=["f", "f", "m", "m"])
    0.5
    """
    true, predicted = as_predictions(y_true, y_pred)
    accuracies, overall = group_accuracy(true, predicted, groups), (true == predicted).mean()
    return float(sum(abs(accuracy - overall) for accuracy in accuracies.values()))


def loss_variance(losses: ArrayLike) -> float:
    """VAR, the variance of the losses over the samples: mean of (loss_i - mean loss)^2.

    Args:
        losses: (N,).

    Raises:
        TypeError, ValueError: ``losses`` that are no numbers, not finite, or of another shape.

    >>> loss_variance([1.0, 1.0, 3.0, 3.0])
    1.0
    """
    return float(as_losses(losses).var())


def worst_alpha_loss(losses: ArrayLike, alpha: float) -> float:
    """The mean of the worst ceil(alpha N) losses: the objective itself, CVaR at level alpha.

    Args:
        losses: (N,), as of `loss_variance`.
        alpha: share in (0, 1]; 1 gives the mean loss.

    Raises:
        TypeError, ValueError: an argument that is impossible.

    >>> worst_alpha_loss([0.1, 2.0, 0.3, 1.0], alpha=0.5)
    1.5
    """
    alpha = check_alpha(alpha)
    ascending = np.sort(as_losses(losses))
    return float(ascending[-worst_off_count(len(ascending), alpha) :].mean())


def intersect(columns: Mapping[str, Array]) -> tuple[list[Group], npt.NDArray[np.intp]]:
    """The combinations that occur, sorted, and each sample's number."""
    each = [np.unique(column, return_inverse=True) for column in columns.values()]
    if len(each) == 1:
        return each[0][0].tolist(), each[0][1]
    codes = np.stack([code for _, code in each], axis=1)
    cells, member = np.unique(codes, axis=0, return_inverse=True)
    named = [values[cell].tolist() for (values, _), cell in zip(each, cells.T, strict=True)]
    return list(zip(*named, strict=True)), member.reshape(-1)  # numpy 2.0 gave a second axis


def as_array(values: ArrayLike) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(object), np.nan)
    array = np.asarray(values)
    if array.dtype.kind in ("T" if isinstance(values, np.ndarray) else "UST"):
        return np.asarray(values, dtype=object)  # or NaN would be "nan"
    return array


def _narrowed(array: Array) -> Array:
    """Objects (pandas' strings) compare slowly and cannot always be sorted."""
    return np.asarray(array.tolist()) if array.dtype == object else array


def _is_known(value: object) -> bool:
    same: object = value == value  # unlike NaN, NaT and pandas.NA
    return value is not None and isinstance(same, bool | np.bool_) and bool(same)


def as_vector(name: str, values: ArrayLike, each: str, mend: str = "") -> Array:
    """``values`` as (N,), N >= 1, nothing missing; ``each`` says what an entry is."""
    array = as_array(values)
    if array.ndim != 1:
        raise ValueError(
            f"{name} has shape {array.shape}: expected (N,), one {each} a sample{mend}"
        )
    if not len(array):
        raise ValueError(f"{name} is empty: expected one {each} a sample")
    objects = array.dtype == object
    gaps = np.array([not _is_known(v) for v in array]) if objects else np.asarray(array != array)
    if gaps.any():
        raise ValueError(
            f"{name} has no value for {gaps.sum()} of {len(array)} samples, the first at "
            f"{gaps.argmax()}: leave these samples out, or give them a value of their own"
        )
    plain = _narrowed(array)
    if plain.ndim > 1:  # of tuples
        return array
    if objects and len(np.unique(plain)) < len(set(array)):
        raise TypeError(f"{name} has 1 and '1', or the like, as values: expected one type")
    return plain


def as_losses(losses: ArrayLike) -> npt.NDArray[np.float64]:
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
    array = as_vector(name, values, "class", "; of scores, scores.argmax(-1)")
    if array.dtype.kind == "f" and (fractions := array != np.round(array)).any():
        first = int(fractions.argmax())
        raise ValueError(
            f"{name}[{first}]={array[first]:g} is no class: of scores, {name} = (scores > 0.5) or "
            "scores.argmax(-1)"
        )
    return array


def as_predictions(y_true: ArrayLike, y_pred: ArrayLike) -> tuple[Array, Array]:
    true, predicted = as_classes("y_true", y_true), as_classes("y_pred", y_pred)
    check_lengths(y_true=true, y_pred=predicted)
    if (true.dtype.kind in "US") != (predicted.dtype.kind in "US"):
        raise TypeError(
            f"y_true has dtype {true.dtype} and y_pred {predicted.dtype}: expected both to be "
            "strings, or both numbers"
        )
    return true, predicted


def as_columns(groups: GroupsLike) -> dict[str, Array]:
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
    found = {name: as_vector(named, column, "group") for name, named, column in columns}
    if len(found) < len(columns):
        raise ValueError(
            f"groups has columns of one name, of {[*found]}: expected names that differ"
        )
    return found


def as_rows(inputs: ArrayLike) -> Array:
    array = _narrowed(as_array(inputs))
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"inputs has shape {array.shape}: expected (N, ...), the features of each sample; "
            "inputs.reshape(-1, 1) for one"
        )
    check_numbers("inputs", array)
    return array.reshape(len(array), -1)


def check_numbers(name: str, array: Array) -> None:
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}: expected numbers; encode categories")
    broken = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if broken.any():
        raise ValueError(
            f"{name}[{broken.argmax()}] has NaN or infinity: fill it, or leave the sample out"
        )


def check_lengths(**arrays: Sized) -> None:
    (first, reference), *others = arrays.items()
    for name, array in others:
        if len(array) != len(reference):
            raise ValueError(
                f"{first} has {len(reference)} samples and {name} has {len(array)}: "
                "expected the same samples in the same order"
            )


def kmeans(rows: Array, n_clusters: int, seed: int) -> Array:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows: fewer clusters
        return np.asarray(KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(rows))
