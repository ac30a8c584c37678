"""Group and tail metrics: against loops and cases counted by hand."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irw_optim import metrics
from irw_optim.metrics import (
    group_accuracy,
    loss_variance,
    mad,
    tad,
    worst_alpha_loss,
    worst_group_accuracy,
)

BY_GROUP = [group_accuracy, worst_group_accuracy, mad, tad]


@st.composite
def evaluations(draw, columns=1):
    """(y_true, y_pred, groups): two to forty samples, two or three classes, some groups."""
    size = draw(st.integers(2, 40))
    classes = arrays.arrays(np.int64, size, elements=st.integers(0, 2))
    groups = arrays.arrays(np.int64, (size, columns), elements=st.integers(0, 3))
    return draw(classes), draw(classes), draw(groups)


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


SAME_GROUPS = {
    "list": ["f", "m", "m"],
    "array": np.array(["f", "m", "m"]),
    "objects": np.array(["f", "m", "m"], dtype=object),
    "column": [["f"], ["m"], ["m"]],
    "mapping": {"sex": ["f", "m", "m"]},
}


@pytest.mark.parametrize("groups", SAME_GROUPS.values(), ids=SAME_GROUPS)
def test_one_column_in_any_container(groups):
    assert group_accuracy([1, 0, 1], [1, 0, 0], groups) == {"f": 1.0, "m": 0.5}


@pytest.mark.parametrize(
    "groups",
    [
        {"sex": ["f", "m", "m"], "old": torch.tensor([0, 0, 1])},
        np.array([["f", 0], ["m", 0], ["m", 1]], dtype=object),
    ],
    ids=["mapping", "array"],
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


def test_a_masked_array_without_a_gap_is_an_array():
    y_true = np.ma.array([1, 0, 1], mask=[0, 0, 0])
    assert group_accuracy(y_true, y_true, np.ma.array(["f", "m", "m"])) == {"f": 1.0, "m": 1.0}


def test_tuples_and_mixed_values_that_differ_are_groups():
    pd = pytest.importorskip("pandas")
    tuples = pd.Series([(1, 2), (1, 2), (1, 3)])
    assert group_accuracy([1, 0, 1], [1, 0, 0], tuples) == {(1, 2): 1.0, (1, 3): 0.0}
    mixed = pd.Series([1, 1, "unknown"], dtype=object)
    assert group_accuracy([1, 0, 1], [1, 0, 0], mixed) == {"1": 1.0, "unknown": 0.0}


def test_columns_of_a_table_have_names_of_their_own():
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame([["f", "x"], ["f", "x"], ["m", "x"]], columns=["g", "g"])
    with pytest.raises(ValueError, match="expected names that differ"):
        group_accuracy([1, 0, 1], [1, 0, 0], table)


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 2")
def test_numpys_strings_are_strings():
    y_true = np.array(["yes", "no"], dtype=np.dtypes.StringDType())
    assert group_accuracy(y_true, ["yes", "no"], y_true) == {"no": 1.0, "yes": 1.0}
    with pytest.raises(TypeError, match="expected both to be strings, or both numbers"):
        group_accuracy(y_true, [1, 0], [0, 0])


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
        (
            {"groups": np.array(["a", np.float64("nan"), "b"], dtype=object)},
            ValueError,
            "groups has no value for 1 of 3",
        ),
        (
            {"groups": np.array(["2020-01-01", "NaT", "2021-01-01"], dtype="M8[D]")},
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
        (
            {"groups": np.ma.array(["a", "b", "b"], mask=[0, 0, 1])},
            ValueError,
            "groups has no value for 1 of 3 samples, the first at 2",
        ),
        ({"y_pred": np.ma.array([1, 0, 0], mask=[0, 1, 0])}, ValueError, "y_pred has no value for"),
        (
            {"groups": {1: [0, 1, 0], "1": [0, 0, 0]}},
            ValueError,
            r"groups has columns of one name, of .'1'.: expected names that differ",
        ),
        (
            {"groups": np.array([1, "1", 2], dtype=object)},
            TypeError,
            "groups has 1 and '1', or the like, as values: expected one type",
        ),
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
        (np.ma.array([1.0, 9.0], mask=[0, 1]), ValueError, "losses has no value for 1 of 2"),
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


def test_public_names_exist():
    assert all(hasattr(metrics, name) for name in metrics.__all__)
