"""The report, and the group metrics with fairlearn's MetricFrame as the oracle."""

import sys

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score

from irw_optim.metrics import (
    group_accuracy,
    group_report,
    loss_variance,
    mad,
    tad,
    worst_alpha_loss,
    worst_group_accuracy,
)

# The extra "report" brings both.
fairlearn_metrics = pytest.importorskip("fairlearn.metrics")
pd = pytest.importorskip("pandas")

# MetricFrame takes milliseconds for each group.
with_fairlearn = settings(max_examples=30)


@st.composite
def evaluations(draw, columns=1):
    """(y_true, y_pred, groups): two to forty samples, two or three classes, some groups."""
    size = draw(st.integers(2, 40))
    classes = arrays.arrays(np.int64, size, elements=st.integers(0, 2))
    groups = arrays.arrays(np.int64, (size, columns), elements=st.integers(0, 3))
    return draw(classes), draw(classes), draw(groups)


def frame_of(y_true, y_pred, groups):
    return fairlearn_metrics.MetricFrame(
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


@pytest.mark.parametrize(
    "groups",
    [pd.Series(["f", "m", "m"], index=[7, 3, 3]), pd.DataFrame({"sex": ["f", "m", "m"]})],
    ids=["series", "frame"],
)
def test_pandas_holds_groups(groups):
    assert group_accuracy([1, 0, 1], [1, 0, 0], groups) == {"f": 1.0, "m": 0.5}
    report = group_report([1, 0, 1], [1, 0, 0], groups)
    assert (report.worst_group, report.worst_group_accuracy) == ("m", 0.5)


def test_a_frame_of_several_columns_keeps_their_types():
    groups = pd.DataFrame({"sex": ["f", "m", "m"], "old": [0, 0, 1]})
    accuracies = group_accuracy([1, 0, 1], [1, 0, 0], groups)
    assert accuracies == {("f", 0): 1.0, ("m", 0): 1.0, ("m", 1): 0.0}


@pytest.mark.parametrize(
    "groups",
    [
        pd.Series(["a", None, "b"]),
        pd.Series(["a", pd.NA, "b"], dtype="string"),
        pd.Series(["a", None, "b"], dtype="category"),
        pd.Series([1, None, 2], dtype="Int64"),
        pd.Series(pd.to_datetime(["2020-01-01", None, "2021-01-01"])),
        np.array([1, pd.NA, 2], dtype=object),
    ],
    ids=["object", "string", "category", "Int64", "datetime", "NA"],
)
def test_missing_values_of_pandas_are_named(groups):
    for function in (group_accuracy, group_report):
        with pytest.raises(ValueError, match=r"groups has no value for 1 of 3 samples, .* at 1"):
            function([1, 0, 1], [1, 0, 0], groups)


def test_groups_that_nobody_is_in_do_not_appear():
    column = pd.Series(pd.Categorical(["a", "b", "a"], categories=["a", "b", "c"]))
    assert group_accuracy([1, 1, 0], [1, 1, 1], column) == {"a": 0.5, "b": 1.0}
    intersection = {"sex": ["f", "f", "m"], "race": ["x", "y", "y"]}
    report = group_report([1, 1, 0], [1, 1, 1], intersection)
    assert list(report.by_group.index) == [("f", "x"), ("f", "y"), ("m", "y")]
    assert report.by_group["samples"].tolist() == [1, 1, 1]
    assert report.by_group["samples"].dtype == int


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
        metrics={"recall": recall_score, "selected": fairlearn_metrics.selection_rate},
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


def test_the_report_on_classes_that_are_strings():
    assert group_report(["yes", "no"], ["yes", "yes"], [0, 1]).worst_group == 1


def test_the_report_refuses_what_the_functions_refuse():
    with pytest.raises(ValueError, match="y_true has 2 samples and groups has 1"):
        group_report([1, 0], [1, 0], [0])
    with pytest.raises(ValueError, match=r"y_pred\[1\]=0.2 is no class"):
        group_report([1, 0], [1, 0.2], [0, 1])
    with pytest.raises(ValueError, match="alpha=2"):
        group_report([1, 0], [1, 0], [0, 1], losses=[1.0, 2.0], alpha=2)
