"""The pages say what was measured, and what they claim holds in a small run of today's code."""

import math
import re

import pandas as pd
import pytest

from benchmarks import report
from benchmarks.evidence import alignment, convergence, many_groups, outliers

EXPERIMENTS = [convergence, alignment, outliers, many_groups]
PAGES = [report.ROOT / "docs" / f"{name}.md" for name in ("convergence", "experiments")]


def small(experiment):
    """The rows of a fast run."""
    return pd.DataFrame(experiment.run(fast=True)[0])


def rows(frame, **values):
    """The rows in which the columns have these values."""
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame


# What is stored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda module: module.__name__)
def test_the_texts_are_those_of_the_stored_result(experiment):
    name = experiment.__name__.split(".")[-1]
    result = report.stored(name)
    assert result.attrs["command"] == f"python -m benchmarks.evidence {name}"
    for stem, text in experiment.texts(result).items():
        assert (report.RESULTS / f"{stem}.md").read_text(encoding="utf-8") == text, stem


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_show_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"```\{include\} (\S+)", text) + re.findall(r"!\[.*?\]\((\S+)\)", text)
    assert len(shown) >= 4
    assert all((page.parent / path).is_file() for path in shown)


def test_spreads_and_paired_differences():
    assert report.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert report.spread([None, 1.0, math.nan]) == "1.00"
    assert report.spread([None]) == "–"
    mean, half = report.interval([0.1, 0.3, 0.2])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert report.paired_text([0.3, 0.5, 0.4], [0.2, 0.2, 0.2]) == "+20.0 ± 24.8"


def test_what_is_stored_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.store("x", [{"a": "b, c", "± d": 1 / 3}, {"a": "α", "e": 2}], alpha=0.3)
    found = report.stored("x")
    assert found.attrs["alpha"] == 0.3
    assert found["a"].tolist() == ["b, c", "α"]
    assert found["± d"][0] == 0.333333
    assert math.isnan(found["e"][0])


def test_the_page_on_convergence_says_what_was_measured():
    for (data, alpha), case in report.stored("convergence").groupby(["data", "alpha"]):
        mean = case.groupby("method").mean(numeric_only=True)
        gap, irw = mean["gap"], rows(case, method="IRW")
        assert gap["CVaR"] < gap["IRW"] < 0.55 * gap["plain"]
        assert (irw["gap"] < 0.02).all()
        further = irw["gap, 8 times the steps"].mean() / gap["IRW"]
        assert further > 0.9 if (data, alpha) == ("Adult", 0.3) else further < 0.6
        assert 0.25 < case["silent share"].mean() < 0.45  # "below a third or so"
        if data == "Law School":  # a smaller worst-off loss, and a worse worst class
            assert mean.loc["CVaR", "worst class"] < mean.loc["plain", "worst class"]


def test_the_page_on_weights_says_what_was_measured():
    frame = report.stored("alignment")
    for (data, loss), case in frame.groupby(["data", "loss"]):
        mean = case.groupby("state").mean(numeric_only=True)
        trained = mean.loc[["by IRW", "plain"]]
        assert (trained["weight and cosine"] > trained["weight and loss"] + 0.1).all()
        assert (trained["heavier class"] > 0.85).all()
        assert (trained["no weight in S"] > 0.3).all()
        assert (trained["weight and loss, one class"] > 0.4).all()
        plain = mean.loc["plain"]
        assert plain["weight of S"] > 0.9
        middle, worst = plain["middle third of S"], plain["worst third of S"]
        if loss == "cross entropy":
            assert worst > 1.4 * middle
        else:
            assert worst < (1.15 if data == "Adult" else 0.95) * middle
    start = rows(frame, data="Adult", loss="cross entropy", state="start")
    # "it can be the other way round"
    assert start["weight and cosine"].mean() < start["weight and loss"].mean()


def test_the_page_on_outliers_says_what_was_measured():
    frame = report.stored("outliers")
    mean = frame.groupby(["data", "corruption", "method"]).mean(numeric_only=True)
    worst = mean["worst label x sex"]
    for data in ("Adult", "Law School"):
        scattered, cluster = (data, "scattered 10 %"), (data, "a cluster 10 %")
        assert mean.loc[(*scattered, "IRWO"), "precision"] > 0.9
        assert 0.35 < mean.loc[(*scattered, "IRWO"), "recall"] < 0.5
        assert worst[(*scattered, "IRWO")] > worst[(*scattered, "IRW")] + 0.05
        for share in (0.1, 0.2):
            found = mean.loc[(data, f"flips {share:.0%}".replace("%", " %"), "IRWO")]
            assert share < found["precision"] < 2.5 * share
            assert found["recall"] < 0.1
        accuracy = mean.loc[(data, "flips 20 %"), "accuracy"]
        plain, irw, irwo = (accuracy[m] for m in ("plain", "IRW", "IRWO"))
        assert plain > irw + 0.095
        assert 0 < irwo - irw < 0.4 * (plain - irw)
        assert mean.loc[(*cluster, "IRWO"), "recall"] < 0.02
        assert mean.loc[(*cluster, "IRWO"), "own clusters, step 20"] > 0.5
        narrow = mean.loc[(data, "clean", "IRWO, eps 0.5")]
        assert narrow["worst label x sex"] == 0
        assert narrow["removed"] > 0.25
        rare = "1" if data == "Adult" else "0"
        for sex in ("Female", "Male"):
            assert narrow[f"label x sex: {rare}, {sex}"] > 0.9
    adult = mean.loc[("Adult", "clean")]
    own, plain = adult["worst label x sex"], adult.loc["plain", "worst label x sex"]
    assert own["IRWO"] < plain - 0.03
    irwo = adult.loc["IRWO"]
    assert irwo["label x sex: 1, Female"] > 4 * irwo["of clean samples"]
    assert worst[("Law School", "clean", "IRWO, up to 20 %")] < 0.01
    assert own["IRWO, up to 20 %"] < 0.6 * plain


def test_the_page_on_many_groups_says_what_was_measured():
    mean = report.stored("many_groups").groupby("method").mean(numeric_only=True)

    def change(method, grouping):
        worst = mean[f"{grouping}: worst"]
        return worst[method] - worst["plain"]

    accuracy = mean["accuracy"]
    for method in ("IRW", "oracle: balanced ages", "oracle: GroupDRO, ages"):
        assert abs(change(method, "age")) < 0.01
    for grouping in ("label × age", "label × race × sex", "label × age × race × sex"):
        assert change("IRW", grouping) > 0.02
    assert accuracy["IRW"] > accuracy["plain"] - 0.01
    balanced, oracle = "class-balanced", "oracle: balanced label × age"
    assert change(balanced, "label × age") > change(oracle, "label × age") - 0.02
    assert change(balanced, "label × age") > change("IRW", "label × age") + 0.1
    lost = [accuracy[m] for m in ("plain", balanced, "IRW, warm-up, center 1")]
    assert lost[0] - lost[2] > 1.5 * (lost[0] - lost[1])
    assert change("IRW, warm-up, center 1", "age") < -0.05
    assert abs(mean.loc["CVaR", "loss"] - math.log(2)) < 0.02


# What holds today -------------------------------------------------------------------------------


@pytest.mark.slow
def test_irw_comes_close_to_the_optimum_and_the_inequalities_hold():
    frame = small(convergence)
    assert frame["uncertainty of F*"].between(-1e-6, 1e-4).all()
    assert (frame["regret"] <= frame["bound of the regret"]).all()
    for (alpha, _), case in frame.groupby(["alpha", "seed"]):
        found = case.set_index("method")
        gap = found["gap"]
        assert gap[["CVaR", "IRW"]].between(-1e-4, 0.05).all()
        assert gap["IRW"] < gap["plain"] / 2 if alpha == 0.3 else gap["CVaR"] < gap["IRW"]
        assert found.loc["IRW", "gap from the optimum"] > -1e-4
        for method in ("CVaR", "IRW"):
            assert found.loc[method, "least ratio"] >= found.loc[method, "constant"] - 1e-9


@pytest.mark.slow
def test_weights_follow_alignment_more_than_loss():
    frame = small(alignment)
    trained = frame[frame["state"] != "start"].groupby(["loss", "state"]).mean(numeric_only=True)
    assert (trained["weight and cosine"] > trained["weight and loss"] + 0.05).all()
    assert (trained["no weight in S"] > 0.1).all()
    assert (trained["heavier class"] > 0.8).all()


@pytest.mark.slow
def test_the_filter_finds_what_lies_alone_and_nothing_else():
    irwo = rows(small(outliers), method="IRWO")
    mean = irwo.groupby("corruption").mean(numeric_only=True)
    assert mean.loc["scattered 10 %", "precision"] > 0.9
    assert mean.loc["flips 10 %", "recall"] < 0.1
    assert mean.loc["flips 20 %", "precision"] < 0.3
    assert mean.loc["a cluster 10 %", "recall"] < 0.1
    assert mean.loc["a cluster 10 %", "own clusters, step 20"] > 0.7
    clean = rows(irwo, corruption="clean")
    assert (clean["label x sex: 1, Male"] > 1.5 * clean["of clean samples"]).all()
    assert (clean["label x sex: 0, Female"] < 0.7 * clean["of clean samples"]).all()


@pytest.mark.slow
def test_irw_helps_the_worst_group_where_the_label_is_in_it():
    frame = small(many_groups)
    irw, plain = (rows(frame, method=m).set_index("seed") for m in ("IRW", "plain"))
    for grouping in ("label × age", "label × race × sex"):
        assert (irw[f"{grouping}: worst"] > plain[f"{grouping}: worst"] + 0.03).all()
