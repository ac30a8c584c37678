"""How the groups fare, and how the losses are spread: in one number each, and as a table."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

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

if TYPE_CHECKING:
    import pandas as pd

Group: TypeAlias = Hashable
"""A value of the one column of groups, or a tuple with a value of each."""

Metric: TypeAlias = Callable[..., Any]
"""``metric(y_true, y_pred) -> number``: those of sklearn.metrics and fairlearn.metrics, say."""


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
        ValueError: lengths that differ, empty input, predictions that are scores, and missing
            values: whether they are a group of their own is for the user to say.

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
    """The combinations of values that occur, sorted, and which of them each sample is in."""
    values, codes = zip(
        *(np.unique(column, return_inverse=True) for column in columns.values()), strict=True
    )
    lists = [value.tolist() for value in values]
    if len(lists) == 1:
        return lists[0], codes[0]
    cells, member = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    keys: list[Group] = [
        tuple(names[code] for names, code in zip(lists, cell, strict=True)) for cell in cells
    ]
    return keys, member.reshape(-1)  # numpy 2.0 gave the inverse a second axis


def share_in(member: npt.NDArray[np.intp], right: Array) -> npt.NDArray[np.float64]:
    """The share of True inside each group, in the order of the groups' numbers."""
    shares: npt.NDArray[np.float64] = np.bincount(member, weights=right) / np.bincount(member)
    return shares


@dataclass(frozen=True, eq=False)
class GroupReport:
    """What `group_report` found; ``print(report)`` shows it.

    Attributes:
        by_group: one row for each group: ``samples``, ``accuracy``, ``mean loss`` if losses were
            given, and the metrics asked for.
        overall: the same for everybody.
        worst_group: the group that fares worst, the first of several.
        worst_group_accuracy: its accuracy.
        mad: largest gap between two groups' accuracies.
        tad: sum over the groups of the distance to the overall accuracy.
        loss_variance: VAR, if losses were given.
        worst_alpha_loss: mean of the worst ceil(alpha N) losses, if losses and alpha were given.
    """

    by_group: pd.DataFrame
    overall: pd.Series
    worst_group: Group
    worst_group_accuracy: float
    mad: float
    tad: float
    loss_variance: float | None = None
    worst_alpha_loss: float | None = None

    def __str__(self) -> str:
        numbers = {
            f"worst group {self.worst_group}": self.worst_group_accuracy,
            "MAD": self.mad,
            "TAD": self.tad,
            "loss variance": self.loss_variance,
            "worst-alpha loss": self.worst_alpha_loss,
        }
        given = [f"{name}: {value:.4f}" for name, value in numbers.items() if value is not None]
        table = self.by_group.to_string(float_format="{:.4f}".format)
        overall = ", ".join(f"{name} {value:.6g}" for name, value in self.overall.items())
        return f"{table}\noverall: {overall}\n" + "\n".join(given)


def group_report(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    groups: GroupsLike,
    *,
    losses: ArrayLike | None = None,
    alpha: float | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> GroupReport:
    """Accuracy, and any other metric, by group, with the disparities between the groups.

    Needs fairlearn: ``pip install "irw-optim[report]"``. The other metrics of this module do not.

    Args:
        y_true: (N,) class labels.
        y_pred: (N,) predicted classes.
        groups: as of `group_accuracy`.
        losses: (N,), for the mean loss of each group and the variance of all.
        alpha: share in (0, 1], for the mean of the worst losses.
        metrics: further columns, {name: metric(y_true, y_pred)}.

    Raises:
        ImportError: fairlearn is not installed.
        TypeError, ValueError: as of `group_accuracy`; ``alpha`` outside (0, 1] or without losses;
            a metric with a name that is taken.

    >>> y_true, y_pred, sex = [1, 0, 1, 1], [1, 0, 0, 1], ["f", "f", "m", "m"]
    >>> report = group_report(y_true, y_pred, {"sex": sex}, losses=[0.1, 0.1, 0.9, 0.5], alpha=0.25)
    >>> print(report)
         samples  accuracy  mean loss
    sex
    f          2    1.0000     0.1000
    m          2    0.5000     0.7000
    overall: samples 4, accuracy 0.75, mean loss 0.4
    worst group m: 0.5000
    MAD: 0.5000
    TAD: 0.5000
    loss variance: 0.1100
    worst-alpha loss: 0.9000
    """
    true, predicted = as_predictions(y_true, y_pred)
    columns = as_columns(groups)
    accuracies = group_accuracy(true, predicted, columns)
    if losses is None and alpha is not None:
        raise ValueError(f"alpha={alpha!r} without losses: expected losses=, one loss a sample")
    try:
        from fairlearn.metrics import MetricFrame, count
        from sklearn.metrics import accuracy_score
    except ImportError as error:
        raise ImportError(
            'group_report needs fairlearn: pip install "irw-optim[report]"'
        ) from error

    table: dict[str, Metric] = {"samples": count, "accuracy": accuracy_score}
    sample_params, variance, worst_losses = {}, None, None
    if losses is not None:
        values = as_losses(losses)
        check_lengths(y_true=true, losses=values)
        variance = loss_variance(values)
        worst_losses = None if alpha is None else worst_alpha_loss(values, alpha)
        table["mean loss"] = lambda y_true, y_pred, losses: losses.mean()
        sample_params["mean loss"] = {"losses": values}
    taken = sorted(set(table) & set(metrics or {}))
    if taken:
        raise ValueError(f"metrics names {taken[0]!r}, which is a column already: rename it")
    frame = MetricFrame(
        metrics={**table, **(metrics or {})},
        y_true=true,
        y_pred=predicted,
        sensitive_features=columns,
        sample_params=sample_params,
    )
    # MetricFrame has a row of NaN for each combination of groups that nobody is in.
    by_group = frame.by_group[frame.by_group["samples"] > 0].astype({"samples": int})
    worst = min(accuracies, key=lambda group: accuracies[group])
    return GroupReport(
        by_group=by_group,
        overall=frame.overall,
        worst_group=worst,
        worst_group_accuracy=accuracies[worst],
        mad=max(accuracies.values()) - accuracies[worst],
        tad=total_disparity(accuracies, float(frame.overall["accuracy"])),
        loss_variance=variance,
        worst_alpha_loss=worst_losses,
    )
