"""Accuracy by group, the losses of all, and what they say in one number."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from irw_optim.metrics._inputs import (
    Array,
    ArrayLike,
    GroupsLike,
    as_columns,
    as_losses,
    as_predictions,
    check_lengths,
)
from irw_optim.weighting import worst_off_count
from irw_optim.weighting.ranges import check_alpha

Group: TypeAlias = Hashable
"""A value of the one column of groups, or a tuple with a value of each."""


def group_accuracy(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> dict[Group, float]:
    """Share of right predictions inside each group.

    Several columns are intersected: each combination of values that occurs is a group. Groups that
    no sample is in have no accuracy and do not appear. Missing values raise: whether they are a
    group of their own, or not in the evaluation, is for the user to say.

    Args:
        y_true: (N,) class labels, numbers or strings.
        y_pred: (N,) predicted classes.
        groups: (N,) one column; (N, c) several; or {name: (N,)}, also as a DataFrame.

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
    return dict(zip(names, share_in(member, true == predicted).tolist(), strict=True))


def worst_group_accuracy(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> float:
    """The accuracy of the group that fares worst, min_g acc_g; arguments of `group_accuracy`.

    >>> worst_group_accuracy([1, 0, 1, 1], [1, 0, 0, 1], groups=["f", "f", "m", "m"])
    0.5
    """
    return min(group_accuracy(y_true, y_pred, groups).values())


def mad(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> float:
    """MAD, the largest gap between two groups' accuracies; arguments of `group_accuracy`.

    0 for one group.

    >>> mad([1, 0, 1, 1], [1, 0, 0, 1], groups=["f", "f", "m", "m"])
    0.5
    """
    accuracies = group_accuracy(y_true, y_pred, groups).values()
    return max(accuracies) - min(accuracies)


def tad(y_true: ArrayLike, y_pred: ArrayLike, groups: GroupsLike) -> float:
    """TAD, sum_g ``|acc_g - acc|`` with the accuracy acc of all; arguments of `group_accuracy`.

    Every group counts alike, whatever its size, and more groups make a larger sum: compare only
    between models on the same groups.

    >>> tad([1, 0, 1, 1], [1, 0, 0, 1], groups=["f", "f", "m", "m"])
    0.5
    """
    true, predicted = as_predictions(y_true, y_pred)
    accuracies = group_accuracy(true, predicted, groups)
    return total_disparity(accuracies, float((true == predicted).mean()))


def total_disparity(accuracies: Mapping[Group, float], overall: float) -> float:
    """sum_g ``|acc_g - acc|``."""
    return float(sum(abs(accuracy - overall) for accuracy in accuracies.values()))


def loss_variance(losses: ArrayLike) -> float:
    """VAR, the variance of the losses over the samples: mean of (loss_i - mean loss)^2.

    Args:
        losses: (N,), finite.

    Raises:
        TypeError: ``losses`` holds no numbers.
        ValueError: ``losses`` is empty, of another shape, or not finite.

    >>> loss_variance([1.0, 1.0, 3.0, 3.0])
    1.0
    """
    return float(as_losses(losses).var())


def worst_alpha_loss(losses: ArrayLike, alpha: float) -> float:
    """The mean of the worst ceil(alpha N) losses: the objective itself, CVaR at level alpha.

    Args:
        losses: (N,), finite.
        alpha: share in (0, 1]; 1 gives the mean loss.

    Raises:
        TypeError: an argument that holds no numbers.
        ValueError: ``losses`` empty, of another shape or not finite; ``alpha`` outside (0, 1].

    >>> worst_alpha_loss([0.1, 2.0, 0.3, 1.0], alpha=0.5)
    1.5
    """
    alpha = check_alpha(alpha)
    ascending = np.sort(as_losses(losses))
    return float(ascending[-worst_off_count(len(ascending), alpha) :].mean())


def intersect(columns: Mapping[str, Array]) -> tuple[list[Group], npt.NDArray[np.intp]]:
    """The combinations of values that occur, sorted, and which of them each sample is in."""
    values, codes = zip(
        *(np.unique(column, return_inverse=True) for column in columns.values()), strict=True
    )
    cells, member = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    lists = [value.tolist() for value in values]
    keys = [tuple(names[code] for names, code in zip(lists, cell, strict=True)) for cell in cells]
    # numpy 2.0 gave the inverse a second axis.
    return [key if len(key) > 1 else key[0] for key in keys], member.reshape(-1)


def share_in(member: npt.NDArray[np.intp], right: Array) -> npt.NDArray[np.float64]:
    """The share of True inside each group, in the order of the groups' numbers."""
    shares: npt.NDArray[np.float64] = np.bincount(member, weights=right) / np.bincount(member)
    return shares
