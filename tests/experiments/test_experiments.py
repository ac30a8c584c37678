"""The pages say what was measured, and what they claim holds in a small run of today's code."""

import importlib
import math
import re
import statistics
import sys
from pathlib import Path

import pytest

pytest.importorskip("pandas", reason="the experiments need the report extra")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

report = importlib.import_module("benchmarks.experiments.report")
NAMES = ["convergence", "alignment", "outliers", "many_groups", "cost"]
PAGES = [ROOT / "docs" / "convergence.md", ROOT / "docs" / "experiments.md"]


def experiment(name):
    return importlib.import_module(f"benchmarks.experiments.{name}")


def small(name):
    """The result of a fast run, as it would be stored."""
    return report.rounded(experiment(name).run(fast=True))


# What is stored ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_texts_are_those_of_the_stored_result(name):
    result = report.stored(name)
    assert result["command"] == f"python -m benchmarks.experiments.{name}"
    for stem, text in experiment(name).texts(result).items():
        assert (report.RESULTS / f"{stem}.md").read_text(encoding="utf-8") == text, stem


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_show_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"```\{include\} (\S+)", text) + re.findall(r"!\[.*?\]\((\S+)\)", text)
    assert len(shown) >= 4
    assert all((page.parent / path).is_file() for path in shown)


def test_spreads_and_paired_differences():
    assert report.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert report.spread([None, 1.0]) == "1.00"
    assert report.spread([None]) == "–"
    mean, half = report.paired([0.3, 0.5, 0.4], [0.2, 0.2, 0.2])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert report.rounded({"a": [math.nan, 1 / 3]}) == {"a": [None, 0.333333]}


def test_the_page_on_convergence_says_what_was_measured():
    for case in report.stored("convergence")["studies"]:
        gap = {m: means(case["runs"], "methods", m, "gap") for m in ("plain", "CVaR", "IRW")}
        assert gap["CVaR"] < gap["IRW"] < 0.55 * gap["plain"]
        assert all(run["methods"]["IRW"]["gap"] < 0.02 for run in case["runs"])
        further = means(case["runs"], "IRW, 8 times the steps") / gap["IRW"]
        rests = (case["data"], case["alpha"]) == ("Adult", 0.3)
        assert further > 0.9 if rests else further < 0.6
        silent = means(case["runs"], "silent share")
        assert 0.25 < silent < 0.45  # "below a third or so"
        worst = {m: means(case["runs"], "methods", m, "worst class") for m in ("plain", "CVaR")}
        if case["data"] == "Law School":  # a smaller worst-off loss, and a worse worst class
            assert worst["CVaR"] < worst["plain"]


def test_the_cost_table_says_what_grows():
    result = report.stored("cost")
    largest, smallest = result["batches"]["1024"], result["batches"]["32"]
    for key in ("ms", "MiB"):
        ratios = [b["IRWO"][key] / b["IRW"][key] for b in (smallest, largest)]
        assert ratios[1] > 3 * ratios[0]  # distances of all pairs


def means(runs, *keys):
    """The mean over the seeds of one number of their results."""
    values = []
    for one in runs:
        for key in keys:
            one = one[key]
        values.append(one)
    return statistics.mean(values)


def test_the_page_on_weights_says_what_was_measured():
    for case in report.stored("alignment")["cases"]:
        runs = case["runs"]
        for state in ("by IRW", "plain"):
            follows = means(runs, state, "weight and cosine")
            assert follows > means(runs, state, "weight and loss") + 0.1
            assert means(runs, state, "heavier class") > 0.85
            assert means(runs, state, "no weight in S") > 0.3
            assert means(runs, state, "weight and loss, one class") > 0.4
        assert means(runs, "plain", "weight of S") > 0.9
        middle, worst = (means(runs, "plain", f"{n} third of S") for n in ("middle", "worst"))
        if case["loss"] == "cross entropy":
            assert worst > 1.4 * middle
        else:
            assert worst < (1.15 if case["data"] == "Adult" else 0.95) * middle
    start = report.stored("alignment")["cases"][0]["runs"]  # Adult: "it can be the other way round"
    assert means(start, "start", "weight and cosine") < means(start, "start", "weight and loss")


def test_the_page_on_outliers_says_what_was_measured():
    found = {(c["data"], c["corruption"]): c["runs"] for c in report.stored("outliers")["cases"]}
    accuracy = "worst label x sex"
    for data in ("Adult", "Law School"):
        clean, scattered = found[data, "clean"], found[data, "scattered 10 %"]
        cluster, flips = found[data, "a cluster 10 %"], found[data, "flips 20 %"]
        assert means(scattered, "IRWO", "filter", "precision") > 0.9
        assert 0.35 < means(scattered, "IRWO", "filter", "recall") < 0.5
        assert means(scattered, "IRWO", accuracy) > means(scattered, "IRW", accuracy) + 0.05
        for share in (0.1, 0.2):
            runs = found[data, f"flips {share:.0%}".replace("%", " %")]
            assert share < means(runs, "IRWO", "filter", "precision") < 2.5 * share
            assert means(runs, "IRWO", "filter", "recall") < 0.1
        plain, irw, irwo = (means(flips, m, "accuracy") for m in ("plain", "IRW", "IRWO"))
        assert plain > irw + 0.095
        assert 0 < irwo - irw < 0.4 * (plain - irw)
        assert means(cluster, "IRWO", "filter", "recall") < 0.02
        assert means(cluster, "IRWO", "clusters", "early", "in clusters of their own") > 0.5
        assert means(clean, "IRWO, eps 0.5", accuracy) == 0
        assert means(clean, "IRWO, eps 0.5", "filter", "removed") > 0.25
        rare = "1" if data == "Adult" else "0"
        for sex in ("Female", "Male"):
            assert means(clean, "IRWO, eps 0.5", "filter", "label x sex", f"{rare}, {sex}") > 0.9
    adult = found["Adult", "clean"]
    assert means(adult, "IRWO", accuracy) < means(adult, "plain", accuracy) - 0.03
    assert means(adult, "IRWO", "filter", "label x sex", "1, Female") > 4 * means(
        adult, "IRWO", "filter", "of clean samples"
    )
    assert means(found["Law School", "clean"], "IRWO, up to 20 %", accuracy) < 0.01
    halved = means(adult, "IRWO, up to 20 %", accuracy)
    assert halved < 0.6 * means(adult, "plain", accuracy)


def test_the_page_on_many_groups_says_what_was_measured():
    runs = report.stored("many_groups")["runs"]

    def change(method, grouping):
        return means(runs, method, grouping, "worst") - means(runs, "plain", grouping, "worst")

    for method in ("IRW", "oracle: balanced ages", "oracle: GroupDRO, ages"):
        assert abs(change(method, "age")) < 0.01
    for grouping in ("label × age", "label × race × sex", "label × age × race × sex"):
        assert change("IRW", grouping) > 0.02
    assert means(runs, "IRW", "accuracy") > means(runs, "plain", "accuracy") - 0.01
    balanced, oracle = "class-balanced", "oracle: balanced label × age"
    assert change(balanced, "label × age") > change(oracle, "label × age") - 0.02
    assert change(balanced, "label × age") > change("IRW", "label × age") + 0.1
    lost = [means(runs, m, "accuracy") for m in ("plain", balanced, "IRW, warm-up, center 1")]
    assert lost[0] - lost[2] > 1.5 * (lost[0] - lost[1])
    assert change("IRW, warm-up, center 1", "age") < -0.05
    assert abs(means(runs, "CVaR", "loss") - math.log(2)) < 0.02


# What holds today -------------------------------------------------------------------------------


@pytest.mark.slow
def test_irw_comes_close_to_the_optimum_and_the_inequalities_hold():
    for case in small("convergence")["studies"]:
        for run in case["runs"]:
            gap = {name: found["gap"] for name, found in run["methods"].items()}
            assert -1e-6 <= run["uncertainty of F*"] < 1e-4
            assert -1e-4 < gap["CVaR"] < 0.05
            assert -1e-4 < gap["IRW"] < 0.05
            if case["alpha"] == 0.3:
                assert gap["IRW"] < gap["plain"] / 2
            else:
                assert gap["CVaR"] < gap["IRW"]
            assert run["IRW from the optimum"] > -1e-4
            for name, found in run["methods"].items():
                assert found["regret"] <= found["bound of the regret"]
                if name != "plain":
                    assert found["least <d, grad F> / |grad F|^2"] >= case["constant"] - 1e-9


@pytest.mark.slow
def test_weights_follow_alignment_more_than_loss():
    for case in small("alignment")["cases"]:
        for state in ("by IRW", "plain"):
            follows = means(case["runs"], state, "weight and cosine")
            assert follows > means(case["runs"], state, "weight and loss") + 0.05
            assert means(case["runs"], state, "no weight in S") > 0.1
            assert means(case["runs"], state, "heavier class") > 0.8


@pytest.mark.slow
def test_the_filter_finds_what_lies_alone_and_nothing_else():
    cases = {case["corruption"]: case["runs"] for case in small("outliers")["cases"]}

    def mean(how, *keys):
        return means(cases[how], "IRWO", *keys)

    assert mean("scattered 10 %", "filter", "precision") > 0.9
    assert mean("flips 10 %", "filter", "recall") < 0.1
    assert mean("flips 20 %", "filter", "precision") < 0.3
    assert mean("a cluster 10 %", "filter", "recall") < 0.1
    assert mean("a cluster 10 %", "clusters", "early", "in clusters of their own") > 0.7
    for one in cases["clean"]:
        found = one["IRWO"]["filter"]
        assert found["label x sex"]["1, Male"] > 1.5 * found["of clean samples"]
        assert found["label x sex"]["0, Female"] < 0.7 * found["of clean samples"]


@pytest.mark.slow
def test_irw_helps_the_worst_group_where_the_label_is_in_it():
    for one in small("many_groups")["runs"]:
        for grouping in ("label × age", "label × race × sex"):
            assert one["IRW"][grouping]["worst"] > one["plain"][grouping]["worst"] + 0.03


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_irwo_holds_more_than_irw():
    batches = list(small("cost")["batches"].values())
    for found in batches:
        assert found["IRWO"]["MiB"] >= found["IRW"]["MiB"] > found["plain"]["MiB"]
    many = batches[-1]  # the Gramian of a few samples is no more than what a step holds anyway
    assert many["IRWO"]["MiB"] > 1.5 * many["IRW"]["MiB"]
