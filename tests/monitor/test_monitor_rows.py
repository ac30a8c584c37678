"""The numbers of a row against what they are by definition, and the memory that holds the rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from irw_optim import IRWOptimizer, StepRecord, worst_off
from irw_optim.metrics import worst_alpha_loss
from irw_optim.monitor.recording import (
    Batch,
    agreement,
    by_group,
    gradient_norm,
    groups_of,
    read,
    summarise,
)
from irw_optim.monitor.rows import OF_A_PART, Breakdown, Course, Row, parts_of

ALPHA = 0.3


def a_record(size: int, seed: int, classes: int = 3) -> StepRecord:
    draw = torch.Generator().manual_seed(seed)
    losses = torch.rand(size, generator=draw)
    weights = torch.randn(size, generator=draw).clamp(min=0) + 1e-6
    outliers = torch.rand(size, generator=draw) < 0.2
    return StepRecord(
        worst_off=worst_off(losses, ALPHA),
        outliers=outliers,
        scores=weights,
        weights=weights / weights.sum(),
        fallback=torch.tensor(False),
        losses=losses,
        labels=torch.randint(classes, (size,), generator=draw),
    )


def by_class(batch: Batch) -> Breakdown:
    return by_group(batch, {"class": batch.labels})


records = st.builds(a_record, st.integers(1, 40), st.integers(0, 100))


@given(records)
def test_a_row_is_what_its_columns_say(record: StepRecord) -> None:
    row = summarise(read(record, torch.tensor(2.5)), ALPHA)
    weights, losses = record.weights.double(), record.losses.double()
    size = len(losses)
    close = {"rel": 1e-5, "abs": 1e-6}
    assert row["effective_samples"] == pytest.approx(record.effective_sample_size, **close)
    assert row["effective_share"] == pytest.approx(1 / (1 + row["weight_spread"] ** 2), **close)
    assert row["weight_spread"] == pytest.approx(float((size * weights).std(correction=0)), **close)
    assert row["zero_share"] == pytest.approx(float((weights == 0).double().mean()))
    assert row["largest_weight"] == pytest.approx(float(weights.max()), **close)
    assert row["worst_off_weight"] == pytest.approx(float(weights[record.worst_off].sum()), **close)
    assert row["removed_share"] == pytest.approx(float(record.outliers.double().mean()), **close)
    assert row["mean_loss"] == pytest.approx(float(losses.mean()), **close)
    assert row["worst_alpha_loss"] == pytest.approx(worst_alpha_loss(losses, ALPHA), **close)
    for name, q in (("loss_median", 0.5), ("loss_q90", 0.9), ("loss_q99", 0.99)):
        expected = np.quantile(losses.cpu().numpy(), q, method="inverted_cdf")
        assert row[name] == pytest.approx(expected, **close)
    assert row["largest_loss"] == pytest.approx(float(losses.max()), **close)
    assert (row["samples"], row["worst_off_samples"]) == (size, int(record.worst_off.sum()))
    assert (row["gradient_norm"], row["fallback"]) == (2.5, 0.0)


@given(records)
def test_the_parts_of_a_batch_are_sums_over_their_samples(record: StepRecord) -> None:
    breakdown = by_class(read(record, torch.zeros(())))
    assert breakdown.parts == tuple(record.labels.unique().tolist())
    for name in ("samples", "worst_off", "weight"):
        assert sum(breakdown.column(name).values()) == pytest.approx(1.0, rel=1e-5)
    for part in breakdown.parts:
        members = record.labels == part
        expected = {
            "samples": members.double().mean(),
            "worst_off": members[record.worst_off].double().mean(),
            "weight": record.weights[members].sum(),
            "removed": record.outliers[members].double().mean(),
            "loss": record.losses[members].mean(),
        }
        for name, value in expected.items():
            assert breakdown.column(name)[part] == pytest.approx(float(value), rel=1e-5, abs=1e-6)


@given(st.lists(records, min_size=1, max_size=5))
def test_parts_over_many_steps_are_those_of_all_their_samples(several: list[StepRecord]) -> None:
    rows = []
    for step, record in enumerate(several, start=1):
        batch = read(record, torch.zeros(()))
        numbers = {"weighted": 1.0, **summarise(batch, ALPHA)}
        rows.append(Row(step, numbers, {"class": by_class(batch)}))
    labels = torch.cat([record.labels for record in several])
    losses = torch.cat([record.losses for record in several])
    removed = torch.cat([record.outliers for record in several])
    parts = parts_of(rows, "class")
    for name, part in parts.items():
        members = labels == name
        assert part.seen == pytest.approx(int(members.sum()))
        assert part.loss == pytest.approx(float(losses[members].mean()), rel=1e-5)
        assert part.removed == pytest.approx(float(removed[members].double().mean()), abs=1e-6)
    assert sum(part.weight for part in parts.values()) == pytest.approx(1.0, rel=1e-5)


def test_a_row_survives_its_state() -> None:
    batch = read(a_record(12, seed=1), torch.zeros(()))
    breakdowns = {"class": by_class(batch), "group": by_group(batch, {"g": np.arange(12) % 2})}
    row = Row(7, summarise(batch, ALPHA), breakdowns)
    assert Row.of_state(row.state()).flat() == row.flat()
    assert row.flat()["step"] == 7
    assert {f"{name}/group_1" for name in OF_A_PART} <= set(row.flat())
    assert not any("class" in name for name in row.flat(most_parts=2))


def test_agreement_of_three_pairs_in_four() -> None:
    losses, inside = np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False])
    assert agreement(losses, inside) == 0.75


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30).filter(
        lambda pairs: 0 < sum(inside for _, inside in pairs) < len(pairs)
    )
)
def test_agreement_is_the_area_under_the_curve(pairs: list[tuple[int, bool]]) -> None:
    losses, inside = (np.array(values) for values in zip(*pairs, strict=True))
    assert agreement(losses, inside) == pytest.approx(roc_auc_score(inside, losses))


@pytest.mark.parametrize("inside", [True, False])
def test_agreement_is_not_known_without_two_sides(inside: bool) -> None:
    assert math.isnan(agreement(np.arange(3.0), np.full(3, inside)))


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_agreement_takes_a_broken_loss_for_the_largest(broken: float) -> None:
    losses, inside = np.array([1.0, broken, 0.0], np.float32), np.array([True, False, False])
    assert agreement(losses, inside) == pytest.approx(0.5)


def a_row(step: int) -> Row:
    return Row(step, {}, {})


@given(st.integers(1, 5), st.integers(10, 40), st.integers(1, 3000))
def test_memory_is_bounded_and_covers_the_course_evenly(
    every: int, capacity: int, steps: int
) -> None:
    course, made = Course(every, capacity), 0
    for step in range(1, steps + 1):
        if course.due(step):
            course.add(a_row(step))
            made += 1
        assert len(course.rows) <= capacity
    kept = [row.step for row in course.rows]
    interval = course.interval
    assert kept == sorted({1, *range(interval, steps + 1, interval)})
    if steps > every * capacity:
        assert len(kept) >= capacity / 2
        doublings = math.log2(interval / every)
        most = capacity + doublings * math.ceil(capacity / 2) + 1
        assert made <= most, "the work grows with the logarithm"


def test_a_training_that_goes_back_forgets_what_came_after() -> None:
    course = Course(1, 10)
    for step in (1, 2, 3, 4, 2):
        course.add(a_row(step))
    assert [row.step for row in course.rows] == [1, 2]


def test_groups_are_those_of_the_newest_passes() -> None:
    passes = [{"group": np.array(list(told))} for told in ("o", "a", "bb")]
    assert groups_of(passes, a_record(3, seed=0))["group"].tolist() == ["a", "b", "b"]


def test_groups_of_several_columns_are_intersected() -> None:
    batch = read(a_record(4, seed=0), torch.zeros(()))
    columns = {"sex": np.array(["f", "f", "m", "m"]), "old": np.array([0, 1, 0, 0])}
    assert by_group(batch, columns).parts == (("f", 0), ("f", 1), ("m", 0))


def test_the_norm_is_that_of_all_gradients() -> None:
    dense, sparse = torch.nn.Linear(3, 2), torch.nn.Embedding(5, 3, sparse=True)
    parameters = [*dense.parameters(), *sparse.parameters()]
    optimizer = IRWOptimizer(torch.optim.SGD(parameters, lr=0.1), alpha=0.3)
    assert gradient_norm(optimizer) == 0
    dense(sparse(torch.tensor([1, 1, 4]))).square().mean().backward()
    gradients = torch.cat([p.grad.to_dense().flatten() for p in parameters])
    assert float(gradient_norm(optimizer)) == pytest.approx(float(gradients.norm()), rel=1e-6)
