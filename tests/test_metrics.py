"""Group and tail metrics: against loops, fairlearn's MetricFrame and cases counted by hand."""

import math
import sys

import fairlearn.metrics
import hypothesis.extra.numpy as arrays
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import accuracy_score, recall_score

from irw_optim import metrics
from irw_optim.metrics import (
    group_accuracy,
    group_report,
    loss_variance,
    mad,
    tad,
    worst_alpha_loss,
    worst_cell_accuracy,
    worst_cluster_accuracy,
    worst_group_accuracy,
)

# MetricFrame takes milliseconds for each group.
with_fairlearn = settings(max_examples=30)
BY_GROUP = [group_accuracy, worst_group_accuracy, mad, tad, group_report]


@st.composite
def evaluations(draw, columns=1):
    """(y_true, y_pred, groups): two to forty samples, two or three classes, some groups."""
    size = draw(st.integers(2, 40))
    classes = arrays.arrays(np.int64, size, elements=st.integers(0, 2))
    groups = arrays.arrays(np.int64, (size, columns), elements=st.integers(0, 3))
    return draw(classes), draw(classes), draw(groups)


def frame_of(y_true, y_pred, groups):
    return fairlearn.metrics.MetricFrame(
        metrics=accuracy_score, y_true=y_true, y_pred=y_pred, sensitive_features=groups
    )


@with_fairlearn
@given(evaluations())
def test_one_column_is_what_fairlearn_finds(evaluation):
    y_true, y_pred, groups = evaluation
    frame = frame_of(y_true, y_pred, groups[:, 0])

    assert group_accuracy(y_true, y_pred, groups[:, 0]) == pytest.approx(frame.by_group.to_dict())
    assert worst_group_accuracy(y_true, y_pred, groups) == pytest.approx(frame.group_min())
    assert mad(y_true, y_pred, groups) == pytest.approx(frame.difference(method="between_groups"))
    expected = (frame.by_group - frame.overall).abs().sum()
    assert tad(y_true, y_pred, groups) == pytest.approx(expected)


@with_fairlearn
@given(evaluations(columns=2))
def test_several_columns_are_the_groups_that_fairlearn_finds(evaluation):
    y_true, y_pred, groups = evaluation
    by_group = frame_of(y_true, y_pred, groups).by_group.dropna()  # its empty groups

    assert group_accuracy(y_true, y_pred, groups) == pytest.approx(by_group.to_dict())


@given(evaluations(columns=3))
def test_group_accuracy_is_the_accuracy_in_a_loop_over_the_groups(evaluation):
    y_true, y_pred, groups = evaluation
    accuracies = group_accuracy(y_true, y_pred, groups)

    assert list(accuracies) == sorted({tuple(row) for row in groups.tolist()})
    for group, accuracy in accuracies.items():
        inside = (groups == group).all(axis=1)
        assert accuracy == pytest.approx(np.mean(y_true[inside] == y_pred[inside]))


def test_the_numbers_of_a_case_counted_by_hand():
    y_true = [1] * 10
    y_pred = [1, 1, 1, 1, 1, 1, 1, 0, 1, 0]
    groups = ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    assert group_accuracy(y_true, y_pred, groups) == {"a": 1.0, "b": 0.75, "c": 0.5}
    assert worst_group_accuracy(y_true, y_pred, groups) == 0.5
    assert mad(y_true, y_pred, groups) == 0.5
    assert tad(y_true, y_pred, groups) == pytest.approx(0.2 + 0.05 + 0.3)  # of 0.8 overall


def test_one_group_has_no_disparity():
    accuracy, everyone = 0.75, ["all"] * 4
    assert group_accuracy([1, 0, 1, 1], [1, 0, 0, 1], everyone) == {"all": accuracy}
    assert worst_group_accuracy([1, 0, 1, 1], [1, 0, 0, 1], everyone) == accuracy
    assert mad([1, 0, 1, 1], [1, 0, 0, 1], everyone) == 0
    assert tad([1, 0, 1, 1], [1, 0, 0, 1], everyone) == 0


def test_groups_that_nobody_is_in_do_not_appear():
    column = pd.Series(pd.Categorical(["a", "b", "a"], categories=["a", "b", "c"]))
    assert group_accuracy([1, 1, 0], [1, 1, 1], column) == {"a": 0.5, "b": 1.0}
    intersection = {"sex": ["f", "f", "m"], "race": ["x", "y", "y"]}
    report = group_report([1, 1, 0], [1, 1, 1], intersection)
    assert list(report.by_group.index) == [("f", "x"), ("f", "y"), ("m", "y")]
    assert report.by_group["samples"].tolist() == [1, 1, 1]
    assert report.by_group["samples"].dtype == int


SAME_GROUPS = {
    "list": ["f", "m", "m"],
    "array": np.array(["f", "m", "m"]),
    "objects": np.array(["f", "m", "m"], dtype=object),
    "series": pd.Series(["f", "m", "m"], index=[7, 3, 3]),
    "column": [["f"], ["m"], ["m"]],
    "mapping": {"sex": ["f", "m", "m"]},
    "frame": pd.DataFrame({"sex": ["f", "m", "m"]}),
}


@pytest.mark.parametrize("groups", SAME_GROUPS.values(), ids=SAME_GROUPS)
def test_one_column_in_any_container(groups):
    assert group_accuracy([1, 0, 1], [1, 0, 0], groups) == {"f": 1.0, "m": 0.5}
    report = group_report([1, 0, 1], [1, 0, 0], groups)
    assert (report.worst_group, report.worst_group_accuracy) == ("m", 0.5)


@pytest.mark.parametrize(
    "groups",
    [
        {"sex": ["f", "m", "m"], "old": torch.tensor([0, 0, 1])},
        pd.DataFrame({"sex": ["f", "m", "m"], "old": [0, 0, 1]}),
        np.array([["f", 0], ["m", 0], ["m", 1]], dtype=object),
    ],
    ids=["mapping", "frame", "array"],
)
def test_several_columns_in_any_container_keep_their_types(groups):
    accuracies = group_accuracy([1, 0, 1], [1, 0, 0], groups)
    assert accuracies == {("f", 0): 1.0, ("m", 0): 1.0, ("m", 1): 0.0}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16])
def test_tensors_of_any_dtype_and_with_a_graph(dtype):
    y_true = torch.tensor([1, 0, 1, 1]).to(dtype)
    y_pred = torch.tensor([1.0, 0.0, 0.0, 1.0], requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    assert group_accuracy(y_true, y_pred, groups) == {0: 1.0, 1: 0.5}
    losses = torch.tensor([1.0, 1.0, 3.0, 3.0], requires_grad=True).bfloat16()
    assert loss_variance(losses) == 1.0
    assert worst_alpha_loss(losses, 0.5) == 3.0


def test_classes_may_be_strings():
    assert worst_group_accuracy(["yes", "no"], np.array(["yes", "no"], dtype=object), [0, 1]) == 1
    assert group_report(["yes", "no"], ["yes", "yes"], [0, 1]).worst_group == 1


@given(arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1e6)), st.data())
def test_tail_metrics_are_those_of_a_sorted_list(losses, data):
    count = data.draw(st.integers(1, len(losses)))
    worst = sorted(losses, reverse=True)[:count]
    assert worst_alpha_loss(losses, count / len(losses)) == pytest.approx(sum(worst) / count)
    assert worst_alpha_loss(losses, 1) == pytest.approx(losses.mean())
    mean = sum(losses) / len(losses)
    assert loss_variance(losses) == pytest.approx(
        sum((loss - mean) ** 2 for loss in losses) / len(losses), rel=1e-9, abs=1e-6
    )


def test_an_exact_share_is_not_rounded_up():
    losses = np.arange(100.0)
    assert math.ceil(0.07 * 100) == 8  # the trap
    assert worst_alpha_loss(losses, 0.07) == np.arange(93, 100).mean()
    assert worst_alpha_loss(losses, 0.071) == np.arange(92, 100).mean()
    assert worst_alpha_loss(losses, 1e-9) == 99


def test_half_precision_losses_do_not_overflow():
    assert loss_variance(np.array([0, 60000], dtype=np.float16)) == 9e8
    assert worst_alpha_loss(np.full(100, 60000, dtype=np.float16), 1.0) == 60000


@with_fairlearn
@given(evaluations(columns=2))
def test_the_report_holds_what_the_functions_say(evaluation):
    y_true, y_pred, groups = evaluation
    losses = np.linspace(0, 3, len(y_true))
    report = group_report(y_true, y_pred, groups, losses=losses, alpha=0.3)

    assert report.by_group["accuracy"].to_dict() == pytest.approx(
        group_accuracy(y_true, y_pred, groups)
    )
    assert report.by_group["samples"].sum() == len(y_true)
    for group, loss in report.by_group["mean loss"].items():
        assert loss == pytest.approx(losses[(groups == group).all(axis=1)].mean())
    assert report.overall["accuracy"] == pytest.approx(np.mean(y_true == y_pred))
    assert report.overall["mean loss"] == pytest.approx(losses.mean())
    assert report.worst_group_accuracy == worst_group_accuracy(y_true, y_pred, groups)
    assert report.by_group["accuracy"][report.worst_group] == pytest.approx(
        report.worst_group_accuracy
    )
    assert report.mad == pytest.approx(mad(y_true, y_pred, groups))
    assert report.tad == pytest.approx(tad(y_true, y_pred, groups))
    assert report.loss_variance == loss_variance(losses)
    assert report.worst_alpha_loss == worst_alpha_loss(losses, 0.3)


def test_the_report_takes_further_metrics():
    report = group_report(
        [1, 0, 1, 1],
        [1, 0, 0, 1],
        {"sex": ["f", "f", "m", "m"]},
        metrics={"recall": recall_score, "selected": fairlearn.metrics.selection_rate},
    )
    assert report.by_group["recall"].to_dict() == {"f": 1.0, "m": 0.5}
    assert report.by_group["selected"].to_dict() == {"f": 0.5, "m": 0.5}
    assert report.overall["recall"] == pytest.approx(2 / 3)
    assert (report.loss_variance, report.worst_alpha_loss) == (None, None)
    assert "loss" not in str(report)
    assert "recall" in str(report)


def test_the_report_says_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match=r"alpha=0.1 without losses: expected losses="):
        group_report([1, 0], [1, 0], [0, 1], alpha=0.1)
    with pytest.raises(ValueError, match="metrics names 'accuracy', which is a column already"):
        group_report([1, 0], [1, 0], [0, 1], metrics={"accuracy": recall_score})
    with pytest.raises(ValueError, match="y_true has 2 samples and losses has 3"):
        group_report([1, 0], [1, 0], [0, 1], losses=[1.0, 2.0, 3.0])
    monkeypatch.setitem(sys.modules, "fairlearn.metrics", None)
    with pytest.raises(ImportError, match=r'fairlearn: pip install "irw-optim\[report\]"'):
        group_report([1, 0], [1, 0], [0, 1])


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
    clusters = clusters[:, 0]
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


@pytest.mark.parametrize("function", BY_GROUP)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y_pred": [1, 0]}, ValueError, "y_true has 3 samples and y_pred has 2"),
        ({"groups": [1, 0]}, ValueError, "y_true has 3 samples and groups has 2"),
        ({"groups": {"sex": [1, 0]}}, ValueError, "y_true has 3 samples and groups has 2"),
        ({"y_true": [], "y_pred": [], "groups": []}, ValueError, "y_true is empty"),
        ({"y_true": [1, None, 0]}, ValueError, "y_true has no value for 1 of 3 samples"),
        ({"y_pred": [1, 0, math.nan]}, ValueError, "y_pred has no value for 1 of 3 .* at 2"),
        ({"y_pred": [0.1, 0.9, 0.4]}, ValueError, r"y_pred\[0\]=0.1 is no class: .*argmax"),
        ({"y_pred": np.eye(3)}, ValueError, r"y_pred has shape \(3, 3\): .*scores.argmax\(-1\)"),
        ({"y_pred": ["a", "b", "c"]}, TypeError, "y_true has dtype int64 and y_pred <U1"),
        ({"groups": ["a", None, "b"]}, ValueError, "groups has no value for 1 of 3 .* at 1"),
        ({"groups": ["a", math.nan, "b"]}, ValueError, "groups has no value for 1 of 3"),
        ({"groups": [0.0, math.nan, math.nan]}, ValueError, "groups has no value for 2 of 3"),
        ({"groups": pd.Series(["a", pd.NA, "b"])}, ValueError, "groups has no value for 1 of 3"),
        ({"groups": pd.Series([1, None, 2], dtype="Int64")}, ValueError, "groups has no value"),
        (
            {"groups": pd.to_datetime(pd.Series(["2020-01-01", None, "2021-01-01"]))},
            ValueError,
            "groups has no value for 1 of 3",
        ),
        (
            {"groups": {"sex": [0, 1, 0], "race": ["a", None, "b"]}},
            ValueError,
            r"groups\['race'\] has no value for 1 of 3",
        ),
        ({"groups": [["a", 1], ["b", 2], [None, 3]]}, ValueError, r"groups\[:, 0\] has no value"),
        ({"groups": {}}, ValueError, "groups has no column"),
        ({"groups": np.empty((3, 0))}, ValueError, r"groups has shape \(3, 0\): expected one col"),
        ({"groups": np.zeros((3, 1, 1))}, ValueError, r"groups has shape \(3, 1, 1\)"),
    ],
)
def test_impossible_evaluations_are_named(function, change, error, message):
    arguments = {"y_true": [1, 0, 1], "y_pred": [1, 0, 0], "groups": ["a", "b", "b"]}
    with pytest.raises(error, match=message):
        function(**{**arguments, **change})


@pytest.mark.parametrize("function", [loss_variance, lambda losses: worst_alpha_loss(losses, 0.5)])
@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, "losses is empty"),
        ([[1.0]], ValueError, r"losses has shape \(1, 1\): expected \(N,\), one loss a sample"),
        (1.0, ValueError, r"losses has shape \(\)"),
        ([1.0, math.nan], ValueError, "losses has no value for 1 of 2 samples, the first at 1"),
        ([1.0, math.inf], ValueError, r"losses\[1\] is infinite: expected finite losses"),
        (["a"], TypeError, "losses has dtype <U1: expected numbers"),
    ],
)
def test_impossible_losses_are_named(function, losses, error, message):
    with pytest.raises(error, match=message):
        function(losses)


@pytest.mark.parametrize("alpha", [0.0, 1.5, math.nan])
def test_an_impossible_alpha_is_named(alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        worst_alpha_loss([1.0], alpha)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": np.zeros((59, 2))}, ValueError, "y_true has 60 samples and inputs has 59"),
        ({"inputs": np.zeros(60)}, ValueError, r"inputs has shape \(60,\): .*reshape\(-1, 1\)"),
        ({"inputs": np.zeros((60, 0))}, ValueError, r"inputs has shape \(60, 0\)"),
        ({"inputs": np.full((60, 2), "a")}, TypeError, "inputs has dtype <U1: expected numbers"),
        ({"inputs": np.full((60, 2), np.nan)}, ValueError, r"inputs\[0\] is not finite"),
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


def test_public_names_exist():
    assert all(hasattr(metrics, name) for name in metrics.__all__)
