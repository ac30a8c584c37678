"""How the groups fare, and how the tail: metrics of a trained model, on arrays or tensors.

`group_report` has all of them; `worst_cluster_accuracy` is for choosing a model without groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from irw_optim.arguments import whole_number

from ._groups import (
    ArrayLike,
    Group,
    GroupsLike,
    as_columns,
    as_losses,
    as_predictions,
    as_rows,
    as_vector,
    check_lengths,
    group_accuracy,
    kmeans,
    loss_variance,
    mad,
    tad,
    worst_alpha_loss,
    worst_group_accuracy,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Cell",
    "ClusterAccuracy",
    "GroupReport",
    "group_accuracy",
    "group_report",
    "loss_variance",
    "mad",
    "tad",
    "worst_alpha_loss",
    "worst_cell_accuracy",
    "worst_cluster_accuracy",
    "worst_group_accuracy",
]

Metric: TypeAlias = Callable[..., Any]
"""``metric(y_true, y_pred) -> number``, of sklearn.metrics or fairlearn.metrics, say."""


@dataclass(frozen=True, eq=False)
class GroupReport:
    """What `group_report` found; ``print(report)`` shows it.

    Attributes:
        by_group: one row a group: ``samples``, ``accuracy``, ``mean loss`` if losses were given,
            and the metrics asked for; ``overall`` has the same for everybody.
        worst_group: that fares worst, the first of several, with ``worst_group_accuracy``.
        mad: largest gap between two groups' accuracies.
        tad: sum over the groups of the distance to the overall accuracy.
        loss_variance: VAR, if losses were given.
        worst_alpha_loss: mean of the worst ceil(alpha N) losses, if losses and alpha were given.
    """

    by_group: "pd.DataFrame"
    overall: "pd.Series"
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
        overall = ", ".join(f"{name} {value:.6g}" for name, value in self.overall.items())
        lines = [self.by_group.to_string(float_format="{:.4f}".format), f"overall: {overall}"]
        lines += [f"{name}: {value:.4f}" for name, value in numbers.items() if value is not None]
        return "\n".join(lines)


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

    Needs fairlearn: ``pip install "irw-optim[report]"``.

    Args:
        y_true: (N,) classes.
        y_pred: (N,) predicted ones.
        groups: as of `group_accuracy`.
        losses: (N,), for the mean loss of each group and the variance of all.
        alpha: share in (0, 1], for the mean of the worst losses.
        metrics: further columns, {name: metric(y_true, y_pred)}.

    Raises:
        TypeError, ValueError: as of `group_accuracy`; a wrong ``alpha``; a name that is taken.

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
        needed = 'group_report needs fairlearn: pip install "irw-optim[report]"'
        raise ImportError(needed) from error

    table: dict[str, Metric] = {"samples": count, "accuracy": accuracy_score}
    sample_params, tail = {}, {}
    if losses is not None:
        values = as_losses(losses)
        check_lengths(y_true=true, losses=values)
        tail["loss_variance"] = loss_variance(values)
        if alpha is not None:
            tail["worst_alpha_loss"] = worst_alpha_loss(values, alpha)
        table["mean loss"] = lambda y_true, y_pred, losses: losses.mean()
        sample_params["mean loss"] = {"losses": values}
    metrics = metrics or {}
    if taken := sorted(table.keys() & metrics):
        raise ValueError(f"metrics names {taken[0]!r}, which is a column already: rename it")
    frame = MetricFrame(
        metrics={**table, **metrics},
        y_true=true,
        y_pred=predicted,
        sensitive_features=columns,
        sample_params=sample_params,
    )
    # MetricFrame has a row of NaN for each combination of groups that nobody is in.
    by_group = frame.by_group[frame.by_group["samples"] > 0].astype({"samples": int})
    worst = min(accuracies, key=accuracies.__getitem__)
    return GroupReport(
        by_group=by_group,
        overall=frame.overall,
        worst_group=worst,
        worst_group_accuracy=accuracies[worst],
        mad=mad(true, predicted, columns),
        tad=tad(true, predicted, columns),
        **tail,
    )


class Cell(NamedTuple):
    """The samples of one class in one cluster, or in several that are too small by themselves.

    Attributes:
        label: the class.
        clusters: their numbers.
        samples: how many.
        accuracy: share of right predictions.
        counted: whether it is large enough for the worst cell.
    """

    label: Group
    clusters: tuple[int, ...]
    samples: int
    accuracy: float
    counted: bool


class ClusterAccuracy(NamedTuple):
    """What to select a model by where nobody's group is known; see `worst_cluster_accuracy`.

    Attributes:
        worst_cell: the least accuracy of a label x cluster cell that counts.
        worst_class: the least accuracy of a class.
        cells: the table behind ``worst_cell``; ``pandas.DataFrame(cells)`` shows it.
    """

    worst_cell: float
    worst_class: float
    cells: tuple[Cell, ...]

    @property
    def score(self) -> float:
        """The mean of ``worst_cell`` and ``worst_class``: larger is better."""
        return (self.worst_cell + self.worst_class) / 2


def worst_cluster_accuracy(
    inputs: ArrayLike,
    y_true: ArrayLike,
    y_pred: ArrayLike,
    n_clusters: int = 4,
    seed: int = 0,
    *,
    min_cell: int = 20,
) -> ClusterAccuracy:
    """The worst accuracy over label x k-means cluster of the inputs, and that of the worst class.

    Compare models by its ``score`` on the same samples, with the same ``n_clusters`` and ``seed``.
    The clusters are those of scikit-learn's KMeans on the inputs, flattened: standardise features
    before. For many models, cluster once and call `worst_cell_accuracy`. Of one class, all clusters
    with fewer than ``min_cell`` samples are one cell, which counts in ``worst_class`` only where it
    is still smaller.

    Args:
        inputs: (N, ...) numbers, what the model predicts from.
        y_true: (N,) classes.
        y_pred: (N,) predicted ones.
        n_clusters: k >= 1; inputs with fewer distinct rows make fewer clusters.
        seed: of the k-means initialisation.
        min_cell: samples that a cell needs.

    Raises:
        TypeError, ValueError: impossible data, more clusters than samples, no large cell.

    >>> inputs = [[0.0], [0.1], [5.0], [5.1]] * 10
    >>> y_true, y_pred = [0, 1, 0, 1] * 10, [0, 1, 0, 0] * 10
    >>> result = worst_cluster_accuracy(inputs, y_true, y_pred, n_clusters=2, min_cell=10)
    >>> result.worst_cell, result.worst_class, result.score
    (0.0, 0.5, 0.25)
    """
    true, rows = as_predictions(y_true, y_pred)[0], as_rows(inputs)
    check_lengths(y_true=true, inputs=rows)
    n_clusters = whole_number("n_clusters", n_clusters, 1)
    if n_clusters > len(rows):
        raise ValueError(f"n_clusters={n_clusters}: expected at most the {len(rows)} samples given")
    return worst_cell_accuracy(y_true, y_pred, kmeans(rows, n_clusters, seed), min_cell=min_cell)


def worst_cell_accuracy(
    y_true: ArrayLike, y_pred: ArrayLike, clusters: ArrayLike, *, min_cell: int = 20
) -> ClusterAccuracy:
    """`worst_cluster_accuracy` with clusters that are known, from any clustering.

    Args:
        y_true: (N,) class labels.
        y_pred: (N,) predicted classes.
        clusters: (N,) whole numbers.
        min_cell: samples that a cell needs.

    Raises:
        TypeError, ValueError: as of `worst_cluster_accuracy`.

    >>> result = worst_cell_accuracy([0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1], min_cell=1)
    >>> for cell in result.cells:
    ...     print(*cell)
    0 (0,) 2 1.0 True
    1 (0,) 1 1.0 True
    1 (1,) 1 0.0 True
    """
    true, predicted = as_predictions(y_true, y_pred)
    cluster = as_vector("clusters", clusters, "cluster")
    if cluster.dtype.kind not in "iu":
        raise TypeError(f"clusters has dtype {cluster.dtype}: expected whole numbers")
    check_lengths(y_true=true, clusters=cluster)
    min_cell = whole_number("min_cell", min_cell, 1)
    cells = []
    for label in np.unique(true).tolist():
        own = true == label
        names, sizes = np.unique(cluster[own], return_counts=True)
        large = [(name,) for name in names[sizes >= min_cell].tolist()]
        small = tuple(names[sizes < min_cell].tolist())
        for members in [*large, small] if small else large:
            inside = own & np.isin(cluster, members)
            size, accuracy = int(inside.sum()), float((predicted[inside] == label).mean())
            cells.append(Cell(label, members, size, accuracy, size >= min_cell))
    counted = [cell.accuracy for cell in cells if cell.counted]
    if not counted:
        raise ValueError(
            f"min_cell={min_cell}: the largest of the {len(cells)} label x cluster cells has "
            f"{max(cell.samples for cell in cells)} samples; evaluate on more, or lower min_cell"
        )
    worst_class = worst_group_accuracy(true, predicted, groups=true)
    return ClusterAccuracy(min(counted), worst_class, tuple(cells))
