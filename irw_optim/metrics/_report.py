"""All metrics of one model as a table, on fairlearn's MetricFrame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from irw_optim.metrics._groups import (
    Group,
    group_accuracy,
    loss_variance,
    total_disparity,
    worst_alpha_loss,
)
from irw_optim.metrics._inputs import (
    ArrayLike,
    GroupsLike,
    as_columns,
    as_losses,
    as_predictions,
    check_lengths,
)

if TYPE_CHECKING:
    import pandas as pd

Metric: TypeAlias = Callable[..., Any]
"""``metric(y_true, y_pred) -> number``: those of sklearn.metrics and fairlearn.metrics, say."""


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
        y_true: (N,) class labels, as of `group_accuracy`.
        y_pred: (N,) predicted classes.
        groups: (N,) one column; (N, c) several; or {name: (N,)}, also as a DataFrame.
        losses: (N,), for the mean loss of each group and the variance of all.
        alpha: share in (0, 1], for the mean of the worst losses.
        metrics: further columns, {name: metric(y_true, y_pred)}.

    Raises:
        ImportError: fairlearn is not installed.
        TypeError: an argument of another type.
        ValueError: lengths that differ, empty input, missing values, ``alpha`` outside (0, 1] or
            without losses, or a metric with a name that is taken.

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
