"""Choosing a model where nobody's group is known: clusters of the inputs stand in for groups."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from irw_optim.arguments import whole_number
from irw_optim.metrics._groups import Group, intersect, share_in
from irw_optim.metrics._inputs import (
    Array,
    ArrayLike,
    as_array,
    as_predictions,
    as_vector,
    check_lengths,
    check_numbers,
)


class Cell(NamedTuple):
    """The samples of one class in one cluster, or in several that are too small by themselves.

    Attributes:
        label: the class.
        clusters: numbers of the clusters.
        samples: how many samples.
        accuracy: share of right predictions among them.
        counted: whether it has enough samples to count for the worst cell.
    """

    label: Group
    clusters: tuple[int, ...]
    samples: int
    accuracy: float
    counted: bool


class ClusterAccuracy(NamedTuple):
    """What to select a model by where nobody's group is known; see `worst_cluster_accuracy`.

    Attributes:
        worst_cell: the least accuracy of a label x cluster cell, of those that count.
        worst_class: the least accuracy of a class.
        cells: the table behind ``worst_cell``; ``pandas.DataFrame(cells)`` prints it.
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

    Compare models by its ``score`` on the same samples, with the same ``n_clusters`` and ``seed``:
    the clusters depend on these alone. They are those of scikit-learn's KMeans on the inputs as
    given, flattened; features in different units should be standardised before. To judge many
    models on large data, cluster once and call `worst_cell_accuracy`.

    Of one class, all clusters with fewer than ``min_cell`` samples are merged into one cell. If
    that is still smaller it counts in ``worst_class`` only. (An accuracy from fewer than 20 samples
    can have a standard error above 0.11.)

    Args:
        inputs: (N, ...) numbers, what the model predicts from.
        y_true: (N,) class labels.
        y_pred: (N,) predicted classes.
        n_clusters: k >= 1; inputs with fewer distinct rows make fewer clusters.
        seed: of the k-means initialisation.
        min_cell: samples that a cell needs.

    Raises:
        TypeError, ValueError: data that are impossible, more clusters than samples, or no cell with
            ``min_cell`` samples.

    >>> inputs = [[0.0], [0.1], [5.0], [5.1]] * 10
    >>> y_true, y_pred = [0, 1, 0, 1] * 10, [0, 1, 0, 0] * 10
    >>> result = worst_cluster_accuracy(inputs, y_true, y_pred, n_clusters=2, min_cell=10)
    >>> result.worst_cell, result.worst_class, result.score
    (0.0, 0.5, 0.25)
    """
    true, predicted = as_predictions(y_true, y_pred)
    rows = as_rows(inputs)
    check_lengths(y_true=true, inputs=rows)
    n_clusters = whole_number("n_clusters", n_clusters, 1)
    if n_clusters > len(rows):
        raise ValueError(f"n_clusters={n_clusters}: expected at most the {len(rows)} samples given")
    return worst_cell_accuracy(true, predicted, kmeans(rows, n_clusters, seed), min_cell=min_cell)


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
    right = true == predicted
    labels, member = intersect({"label": true})
    cells = []
    for number, label in enumerate(labels):
        own = member == number
        names, sizes = np.unique(cluster[own], return_counts=True)
        large = [(name,) for name in names[sizes >= min_cell].tolist()]
        small = tuple(names[sizes < min_cell].tolist())
        for members in [*large, small] if small else large:
            inside = right[own & np.isin(cluster, members)]
            size = len(inside)
            cells.append(Cell(label, members, size, float(inside.mean()), size >= min_cell))
    counted = [cell.accuracy for cell in cells if cell.counted]
    if not counted:
        raise ValueError(
            f"min_cell={min_cell}: the largest of the {len(cells)} label x cluster cells has "
            f"{max(cell.samples for cell in cells)} samples; expected one with {min_cell} or more: "
            "evaluate on more samples, or lower min_cell"
        )
    return ClusterAccuracy(min(counted), float(share_in(member, right).min()), tuple(cells))


def kmeans(rows: Array, n_clusters: int, seed: int) -> npt.NDArray[np.int32]:
    """The cluster of each row, (N,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct rows than clusters make fewer clusters, and that is right.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(n_clusters, n_init=10, random_state=seed).fit(rows)
    clusters: npt.NDArray[np.int32] = fitted.labels_
    return clusters


def as_rows(inputs: ArrayLike) -> Array:
    """Inputs of any shape (N, ...) as finite rows (N, d)."""
    array = as_array(inputs)
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"inputs has shape {array.shape}: expected (N, ...), the features of each sample; "
            "inputs.reshape(-1, 1) for a single feature"
        )
    check_numbers("inputs", array)
    return array.reshape(len(array), -1)
