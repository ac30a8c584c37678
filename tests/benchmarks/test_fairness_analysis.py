"""From runs to conclusions, on runs made up so that the answers are known."""

import doctest
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.evidence import analysis, tables
from benchmarks.evidence.analysis import WITH, WITHOUT, Target, estimate, linearised


def run(seed, method, setting, test, validation, score, told="", noise=0.0):
    return {
        "noise": noise,
        "seed": seed,
        "method": method,
        "setting": setting,
        "told": told,
        "score without groups": score,
        "validation worst g": validation,
        "test worst g": test,
        "test accuracy": 0.9,
    }


@pytest.fixture
def runs():
    rows = []
    for seed in range(3):
        rows += [
            run(seed, "plain", "plain", 0.5, 0.5, 0.5),
            run(seed, "A", "A: 1", 0.6, 0.9, 0.1),
            run(seed, "A", "A: 2", 0.7, 0.1, 0.9),
            run(seed, "GroupDRO", "GroupDRO, g", 0.9, 0.9, 0.0, told="g"),
            run(seed, "group balancing", "group balancing, g", 1.0, 0.8, 0.9, told="g"),
            run(seed, "GroupDRO", "GroupDRO, h", 0.1, 1.0, 1.0, told="h"),
        ]
    return pd.DataFrame(rows)


def test_examples_in_docstrings():
    outcome = doctest.testmod(analysis)
    assert outcome.attempted
    assert not outcome.failed


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(0).normal(size=5)
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    found = estimate(values)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_no_verdict():
    assert math.isnan(estimate([3.0]).half)
    assert estimate([3.0]).verdict == "no clear difference"


@pytest.mark.parametrize(("shift", "verdict"), [(5, "higher"), (-5, "lower"), (0, None)])
def test_verdicts(shift, verdict):
    found = estimate(np.array([-1.0, 0.0, 1.0]) + shift)
    assert found.verdict == (verdict or "no clear difference")


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        below = 1 + 0.1 * generator.normal(size=5)
        above = 0.6 * below + 0.1 * generator.normal(size=5)
        found = estimate(linearised(above, below))
        hits += found.low < 0.6 < found.high
    assert 0.92 < hits / 2000 < 0.98


class TestChoice:
    def test_with_groups_by_the_worst_group_on_validation(self, runs):
        chosen = Target("t", "g", runs).chosen("A", WITH)
        assert set(chosen["setting"]) == {"A: 1"}

    def test_without_groups_by_the_clusters(self, runs):
        chosen = Target("t", "g", runs).chosen("A", WITHOUT)
        assert set(chosen["setting"]) == {"A: 2"}

    def test_the_oracle_was_told_this_grouping(self, runs):
        assert set(Target("t", "g", runs).oracle()["setting"]) == {"GroupDRO, g"}

    def test_never_looks_at_the_test_part(self, runs):
        shuffled = runs.assign(**{"test worst g": np.random.default_rng(0).random(len(runs))})
        for by in (WITH, WITHOUT):
            assert (
                Target("t", "g", shuffled).chosen("A", by)["setting"].tolist()
                == Target("t", "g", runs).chosen("A", by)["setting"].tolist()
            )


def test_headroom_recovered(runs):
    target = Target("t", "g", runs)
    assert target.headroom().mean == pytest.approx(0.4)
    assert target.recovered(target.chosen("A", WITH)).mean == pytest.approx(0.25)
    assert target.recovered(target.chosen("A", WITHOUT)).mean == pytest.approx(0.5)
    assert target.recovered(target.plain()).mean == 0
    assert target.recovered(target.oracle()).mean == 1


class TestOneSetting:
    """One setting for all data sets, without groups, and by the other data sets' groups."""

    def test_the_search_is_by_the_mean_score_over_data_sets_and_flips(self, tmp_path):
        method = "IRW class by class, held"
        scores = {  # of two settings: on two data sets without flips, on one of them with flips
            f"{method}: 1": {("adult", 0.0): 0.6, ("law_school", 0.0): 0.8, ("adult", 0.2): 0.1},
            f"{method}: 2": {("adult", 0.0): 0.5, ("law_school", 0.0): 0.7, ("adult", 0.2): 0.4},
        }
        rows = pd.DataFrame(
            {"task": task, **run(seed, method, setting, 0.0, 0.0, score, noise=noise)}
            for setting, found in scores.items()
            for (task, noise), score in found.items()
            for seed in range(2)
        )
        for task, own in rows.groupby("task"):
            own.drop(columns="task").to_csv(tmp_path / f"{task}.csv", index=False)
        found = tables.scores(tmp_path)
        assert found.loc[f"{method}: 1"].tolist() == pytest.approx([0.7, 0.1])
        assert found.loc[f"{method}: 2"].tolist() == pytest.approx([0.6, 0.4])
        assert tables.choice(tmp_path) == f"{method}: 2"  # 0.5 against 0.4
        assert tables.choice(tmp_path, method, [0.0]) == f"{method}: 1"


def test_seeds_that_are_not_complete_are_left_out(runs, tmp_path):
    late = pd.DataFrame([run(3, "plain", "plain", 0.0, 0.0, 0.0)])
    noisy = pd.DataFrame([run(0, "plain", "plain", 0.2, 0.0, 0.0, noise=0.1)])
    pd.concat([runs, late, noisy]).to_csv(tmp_path / "t.csv", index=False)
    assert set(analysis.target(tmp_path, "t", "g").runs["seed"]) == {0, 1, 2}
    assert analysis.target(tmp_path, "t", "g", noise=0.1).plain()["test worst g"].tolist() == [0.2]
