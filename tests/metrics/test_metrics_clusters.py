"""Label x cluster cells: the rule for small cells in a loop, and scikit-learn's clusters."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from irw_optim.metrics import worst_cell_accuracy, worst_cluster_accuracy


@st.composite
def evaluations(draw):
    """(y_true, y_pred, clusters): two to forty samples, up to three classes, four clusters."""
    size = draw(st.integers(2, 40))
    classes = arrays.arrays(np.int64, size, elements=st.integers(0, 2))
    return (
        draw(classes),
        draw(classes),
        draw(arrays.arrays(np.int64, size, elements=st.integers(0, 3))),
    )


def blobs(size=600, dimensions=2, seed=0):
    """Three well separated clusters, each of every class."""
    generator = np.random.default_rng(seed)
    cluster = generator.integers(3, size=size)
    inputs = 10 * cluster[:, None] + generator.normal(size=(size, dimensions))
    return inputs, cluster, generator.integers(2, size=size)


def test_the_worst_cell_is_the_planted_one():
    inputs, cluster, y_true = blobs()
    broken = np.flatnonzero((cluster == 1) & (y_true == 0))
    y_pred = y_true.copy()
    y_pred[broken[: len(broken) // 2]] = 1

    result = worst_cluster_accuracy(inputs, y_true, y_pred, n_clusters=3)

    assert result.worst_cell == pytest.approx(1 - (len(broken) // 2) / len(broken))
    assert result.worst_class == pytest.approx(np.mean((y_pred == 0)[y_true == 0]))
    assert result.score == pytest.approx((result.worst_cell + result.worst_class) / 2)
    assert len(result.cells) == 6
    assert sum(cell.samples for cell in result.cells) == len(inputs)
    (worst,) = [cell for cell in result.cells if cell.accuracy < 1]
    assert (worst.label, worst.samples, worst.counted) == (0, len(broken), True)


def test_the_clusters_are_those_of_scikit_learn_and_depend_on_the_seed_alone():
    inputs = np.random.default_rng(0).normal(size=(300, 4))
    y_true, y_pred = np.arange(300) % 2, np.arange(300) % 3 % 2
    clusters = KMeans(4, n_init=10, random_state=3).fit(inputs).labels_

    result = worst_cluster_accuracy(inputs, y_true, y_pred, seed=3)

    assert result == worst_cell_accuracy(y_true, y_pred, clusters)
    assert result == worst_cluster_accuracy(torch.from_numpy(inputs), y_true, y_pred, seed=3)
    assert result != worst_cluster_accuracy(inputs, y_true, y_pred, seed=4)


def test_inputs_of_any_shape_are_flattened():
    inputs, _, y_true = blobs(dimensions=12)
    y_pred = np.zeros_like(y_true)
    images = torch.from_numpy(inputs).float().view(-1, 3, 2, 2)
    assert worst_cluster_accuracy(images, y_true, y_pred) == worst_cluster_accuracy(
        inputs.astype(np.float32), y_true, y_pred
    )


def test_few_distinct_inputs_make_few_clusters_without_a_warning():
    inputs = np.repeat([[0.0], [1.0]], 30, axis=0)
    result = worst_cluster_accuracy(inputs, [0] * 60, [0] * 60, n_clusters=4)
    assert len(result.cells) == 2


@given(evaluations(), st.integers(1, 12))
def test_cells_follow_the_rule(evaluation, min_cell):
    y_true, y_pred, clusters = evaluation
    sizes = {
        (label, cluster): np.sum((y_true == label) & (clusters == cluster))
        for label, cluster in set(zip(y_true.tolist(), clusters.tolist(), strict=True))
    }
    expected = {}  # (label, clusters) -> right predictions
    for label in np.unique(y_true).tolist():
        mine = {c: n for (owner, c), n in sizes.items() if owner == label}
        small = tuple(sorted(c for c, n in mine.items() if n < min_cell))
        for members in [(c,) for c in mine if c not in small] + [small] * bool(small):
            inside = (y_true == label) & np.isin(clusters, members)
            expected[label, members] = (y_pred == label)[inside]
    counted = [np.mean(right) for right in expected.values() if len(right) >= min_cell]
    if not counted:
        with pytest.raises(ValueError, match=f"min_cell={min_cell}: the largest of"):
            worst_cell_accuracy(y_true, y_pred, clusters, min_cell=min_cell)
        return

    result = worst_cell_accuracy(y_true, y_pred, clusters, min_cell=min_cell)

    assert {(cell.label, cell.clusters) for cell in result.cells} == set(expected)
    for cell in result.cells:
        right = expected[cell.label, cell.clusters]
        assert cell.samples == len(right)
        assert cell.accuracy == pytest.approx(np.mean(right))
        assert cell.counted == (len(right) >= min_cell)
    assert result.worst_cell == pytest.approx(min(counted))
    assert result.worst_class == pytest.approx(
        min(np.mean(y_pred[y_true == label] == label) for label in np.unique(y_true))
    )


def test_a_class_too_small_for_any_cell_counts_as_a_class_only():
    y_true = [0] * 40 + [1] * 5
    result = worst_cell_accuracy(y_true, [0] * 45, [0] * 20 + [1] * 25, min_cell=20)
    assert result.worst_cell == 1.0
    assert result.worst_class == 0.0
    assert [cell.counted for cell in result.cells] == [True, True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": np.zeros((59, 2))}, ValueError, "y_true has 60 samples and inputs has 59"),
        ({"inputs": np.zeros(60)}, ValueError, r"inputs has shape \(60,\): .*reshape\(-1, 1\)"),
        ({"inputs": np.zeros((60, 0))}, ValueError, r"inputs has shape \(60, 0\)"),
        ({"inputs": np.full((60, 2), "a")}, TypeError, "inputs has dtype <U1: expected numbers"),
        ({"inputs": np.full((60, 2), np.nan)}, ValueError, r"inputs\[0\] has NaN"),
        ({"y_pred": [0]}, ValueError, "y_true has 60 samples and y_pred has 1"),
        ({"n_clusters": 0}, ValueError, "n_clusters=0: expected a whole number >= 1"),
        ({"n_clusters": 61}, ValueError, "n_clusters=61: expected at most the 60 samples given"),
        ({"n_clusters": 2.0}, TypeError, "n_clusters=2.0"),
        ({"n_clusters": True}, TypeError, "n_clusters=True"),
        ({"min_cell": 0}, ValueError, "min_cell=0: expected a whole number >= 1"),
        ({"min_cell": 61}, ValueError, "min_cell=61: the largest of the .* lower min_cell"),
    ],
)
def test_impossible_cluster_evaluations_are_named(change, error, message):
    arguments = {"inputs": np.arange(120.0).reshape(60, 2), "y_true": [0] * 60, "y_pred": [0] * 60}
    with pytest.raises(error, match=message):
        worst_cluster_accuracy(**{**arguments, **change})


def test_clusters_are_whole_numbers_of_the_same_samples():
    with pytest.raises(TypeError, match="clusters has dtype float64: expected whole numbers"):
        worst_cell_accuracy([0, 1], [0, 1], [0.0, 1.0], min_cell=1)
    with pytest.raises(ValueError, match="y_true has 2 samples and clusters has 1"):
        worst_cell_accuracy([0, 1], [0, 1], [0], min_cell=1)
