"""What goes into a comparison, and what comes out of it: on little data, in seconds."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from little import SMALL, compare, people
from scipy import stats
from sklearn.metrics import accuracy_score
from torch import nn

from irw_optim import compare_remedies
from irw_optim.metrics import worst_cell_accuracy, worst_group_accuracy
from irw_optim.remedies import REMEDIES, Fitted
from irw_optim.remedies._data import logits_of
from irw_optim.remedies._judging import (
    Difference,
    Judge,
    as_text,
    beyond_chance,
    calibration_error,
    signs_of_hurt,
    unseen_by_clusters,
)

for library in ("fairlearn", "jinja2", "matplotlib", "tqdm"):
    pytest.importorskip(library, reason="remedies need the report extra")
pd = pytest.importorskip("pandas", reason="remedies need the report extra")


class Says(nn.Module):
    """A model that is what it is; it has a parameter, as models have."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.unused = rule, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        right = self.rule(x).float()
        return torch.stack([1 - right, right], 1) * 4 + 0 * self.unused


def knows(minority):
    """The true class, and of the minority's rich only some."""
    y = torch.from_numpy(people(seed=1)[1]).bool()
    x = torch.from_numpy(people(seed=1)[0])

    def rule(given):
        at = (given[:, None] == x[None]).all(2).float().argmax(1)
        return y[at] & ((given[:, 1] < 0) | (torch.arange(len(given)) % 10 < 10 * minority))

    return lambda training: Says(rule)


@pytest.fixture(scope="module")
def result():
    return compare(groups={"label": people(seed=1)[1], "minority": people(seed=1)[0][:, 1] > 0})


class TestResult:
    def test_every_remedy_seed_and_metric(self, result):
        assert set(result.predictions) == {*REMEDIES, "groups known (oracle)"}
        assert list(result.runs.loc["plain"].index) == [0, 1]
        columns = ["accuracy", "worst group", "worst class", "worst cell", "score", "tail loss"]
        columns += ["calibration error", "effective share", "time"]
        assert [m.name for m in result.metrics] == columns
        assert not result.table.drop(index="groups known (oracle)").isna().any(axis=None)
        for name, predicted in result.predictions.items():
            assert predicted.shape == (2, 200)
            shares = [accuracy_score(people(seed=1)[1], one) for one in predicted]
            assert list(result.runs.loc[name, "accuracy"]) == pytest.approx(shares)

    @pytest.mark.parametrize("metric", ["accuracy", "worst group", "tail loss"])
    def test_intervals_are_those_of_the_paired_t_test(self, result, metric):
        for name in REMEDIES:
            one, plain = (result.runs.loc[n, metric] for n in (name, "plain"))
            found = result.difference(name, metric)
            if np.allclose(np.diff(one - plain), 0):
                continue  # scipy has no interval there
            low, high = stats.ttest_rel(one, plain).confidence_interval(0.95)
            assert (found.low, found.high) == pytest.approx((low, high))
            assert found.clear == (low > 0 or high < 0)

    def test_one_seed_has_no_interval_and_decides_nothing(self):
        mine = {"perfect": knows(1.0)}
        one = compare(remedies=mine, seeds=1)
        assert one.take == "plain"
        assert "One seed has no spread" in str(one)
        assert np.isnan(one.difference("perfect", "accuracy").low)

    def test_to_pandas_and_by_group(self, result):
        frame = result.to_pandas()
        assert list(frame) == ["mean", "difference", "low", "high"]
        assert frame.loc[("IRW", "accuracy"), "mean"] == result.table.loc["IRW", "accuracy"]
        x, y = people(seed=1)
        table = result.by_group({"old": x[:, 0] > 0, "y": y})
        assert table["people"].sum() == 200
        predicted = result.predictions["IRW"]
        own = (x[:, 0] > 0) & (y == 1)
        assert table.loc["old True, y 1", "IRW"] == pytest.approx((predicted[:, own] == 1).mean())

    def test_the_page_needs_nothing_and_says_the_same(self, result, tmp_path):
        text = result.to_html(tmp_path / "new" / "page.html")
        assert (tmp_path / "new" / "page.html").read_text("utf-8") == text
        page = Page(text)
        assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
        assert page.tags.count("svg") == len(result.figure().axes)
        assert page.tags.count("details") == 6  # columns, differences, class, cell, group, runs
        read = " ".join(" ".join(page.words).split())
        for sentence in result.sentences:
            assert sentence in read
        assert page.tags.index("ol") < page.tags.index("svg") < page.tags.index("table")
        assert page.tags.count("table") == 1 + page.tags[page.tags.index("details") :].count(
            "table"
        )
        assert "<html" not in result._repr_html_()

    def test_the_text_is_short(self, result):
        assert len(str(result).splitlines()) < 2 * len(REMEDIES) + 15
        assert str(result).startswith(" ")

    def test_figure_has_a_panel_for_each_share(self, result):
        titles = [axis.get_title(loc="left") for axis in result.figure().axes]
        assert [title.split(" (")[0] for title in titles] == [
            *("accuracy", "worst group", "worst class", "worst cell"),
        ]

    def test_headroom_is_what_the_groups_would_gain(self, result):
        assert result.sentences[4].startswith("Headroom: a last layer fitted anew, groups known")
        assert result.table.loc["groups known (oracle)", "worst group"] > 0.3

    def test_random_numbers_go_on_as_before(self):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        compare(remedies=["plain"], seeds=[3])
        assert torch.equal(torch.rand(3), expected)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_data(self, data):
        self.words.append(data)


class TestDecision:
    def test_no_remedy_is_clearly_better(self):
        again = {f"plain {i}": REMEDIES["plain"] for i in range(3)}
        found = compare(remedies=again)
        assert found.take == "plain"
        assert found.sentences[0].startswith("No remedy is clearly better than plain training")

    def test_the_simplest_of_those_that_are_no_worse_is_taken(self):
        mine = {"plain": knows(0.1), "some": knows(0.5)}
        mine |= {"perfect": knows(1.0), "as good": knows(1.0)}
        for names, expected in (
            (["some", "perfect", "as good"], "perfect"),
            (["as good", "perfect"], "as good"),
        ):
            found = compare(remedies={name: mine[name] for name in ("plain", *names)})
            assert found.take == expected
            assert found.sentences[0].startswith(f"Take {expected}, the simplest of those")

    def test_a_gain_among_few_people_is_none(self):
        """It is the same with every seed, but could be who happens to be in the data."""
        found = compare(remedies={"plain": knows(0.9), "perfect": knows(1.0)})
        assert found.difference("perfect", "score").low > 0
        assert found.take == "plain"

    @pytest.mark.parametrize("mean", [0.05, 0.1, 0.12, 0.13, 0.14, 0.2])
    def test_the_variances_of_seeds_and_people_add_up(self, mean):
        differences = mean + 0.1 * np.array([-1, -1, 1, 1, 0])
        moves = np.full(100, np.sqrt(0.002 / 100))
        of_seeds = stats.ttest_1samp(differences, 0, alternative="greater").pvalue < 0.025
        assert beyond_chance(differences, 0 * moves, 0.95) == of_seeds
        # 0.002 each; 4 * 0.004^2 / 0.002^2 = 16 degrees of freedom
        limit = stats.t.ppf(0.975, 16) * np.sqrt(0.004)
        assert beyond_chance(differences, moves, 0.95) == (mean > limit)
        even = np.full(5, mean)
        assert beyond_chance(even, moves, 0.95) == (mean > 1.96 * np.sqrt(0.002))

    def test_a_gain_with_some_seeds_is_none(self):
        def lucky(training):
            return knows(1.0 if training.seed == 0 else 0.1)(training)

        found = compare(remedies={"plain": knows(0.1), "lucky": lucky})
        assert found.difference("lucky", "score").mean > 0.1
        assert found.take == "plain"

    def test_a_simpler_one_that_is_worse_by_few_people_is_taken(self):
        mine = {"plain": knows(0.1), "nearly": knows(0.9), "perfect": knows(1.0)}
        assert compare(remedies=mine).take == "nearly"

    def test_signs_that_a_remedy_hurts(self):
        def memory(training):
            x, y = (torch.from_numpy(part) for part in people())
            rule = lambda given: (  # noqa: E731
                (given[:, None] == x[None]).all(2).float() @ y.float()
            ).bool()
            return Fitted(Says(rule), effective_share=0.2, held=True)

        found = compare(remedies={"class-balanced": knows(1.0), "memory": memory})
        said = "; ".join(found.signs["memory"])
        assert "it learns class 1 by heart: 100% right in training, 0% in validation" in said
        assert "its held weights rest on 20% of the samples" in said
        assert "it costs accuracy" in said
        assert "class-balanced" not in found.signs
        assert "Signs that a remedy hurts" in found.to_html()
        others = found.runs[found.runs.index.get_level_values("remedy") != "memory"]
        assert not signs_of_hurt(others, 1)

    def test_a_shortcut_that_clusters_do_not_see(self):
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 2000)
        shortcut = np.where(rng.random(2000) < 0.95, y, 1 - y)
        x = np.column_stack([rng.normal(size=(2000, 3)) * 9, shortcut]).astype(np.float32)
        judge = Judge(torch.from_numpy(y), (x[:, 0] > 0).astype(int), None, 20)
        said = unseen_by_clusters(x, judge, (shortcut == y)[None])
        assert said.startswith("feature 3 alone tells 95%")
        assert "0% right" in said
        worse = (x[:, 0] > 0) & (np.arange(2000) % 2 == 0)
        assert unseen_by_clusters(x[:, :3], judge, ~worse[None]) is None
        evenly = np.arange(2000) % 2 == 0
        assert "no cluster fares worse than its class" in unseen_by_clusters(
            x[:, :3], Judge(torch.from_numpy(y), np.zeros(2000, int), None, 20), evenly[None]
        )
        with pytest.warns(UserWarning, match="no groups were given, and feature 3 alone"):
            compare_remedies(
                lambda: Says(lambda given: given[:, 3] > 0.5),
                *(nn.CrossEntropyLoss(), (x, y), (x, y)),
                **{**SMALL, "remedies": ["plain"]},
            )


class TestMeasures:
    def test_parts_are_those_of_the_metrics(self):
        rng = np.random.default_rng(0)
        y, cluster = rng.integers(0, 3, 300), rng.integers(0, 9, 300) // 2
        group = np.array(["a", "b", "c"])[rng.integers(0, 3, 300)]
        predicted = np.where(rng.random((2, 300)) < 0.6, y, 0)
        judge = Judge(torch.from_numpy(y), cluster, group, 15)
        for i, one in enumerate(predicted):
            expected = worst_cell_accuracy(y, one, cluster, min_cell=15)
            found = {k: judge.accuracies(k, predicted == y)[i].min() for k in judge.parts}
            assert found["cell"] == pytest.approx(expected.worst_cell)
            assert found["class"] == pytest.approx(expected.worst_class)
            assert found["group"] == pytest.approx(worst_group_accuracy(y, one, group))

    def test_the_error_over_people_is_the_binomial_one(self):
        y = np.repeat([0, 1], [300, 100])
        right = np.ones((1, 400), bool)
        right[0, :120] = False
        judge = Judge(torch.from_numpy(y), np.zeros(400, int), y.astype(str), 20)
        moves = judge.moves(right)
        assert judge.accuracies("group", right).min() == pytest.approx(0.6)
        assert np.sqrt((moves**2).sum()) == pytest.approx(np.sqrt(0.6 * 0.4 / 300))

    def test_calibration_error_is_the_gap_in_ten_bins(self):
        torch.manual_seed(0)
        logits = torch.randn(1000, 2)
        right = np.random.default_rng(0).random(1000) < 0.7
        order = np.argsort(logits.softmax(1).amax(1).numpy(), kind="stable").reshape(10, 100)
        said = logits.softmax(1).amax(1).numpy()[order].mean(1)
        expected = np.abs(right[order].mean(1) - said).mean()
        assert calibration_error(logits, right) == pytest.approx(expected, abs=0.01)

    def test_a_difference_as_text(self):
        assert as_text(Difference(0.1, 0.05, 0.15)) == "+10.0 points (+5.0 to +15.0)"

    def test_small_groups_do_not_count(self):
        y = np.repeat([0, 1], 50)
        group = np.array(["few"] * 5 + ["many"] * 95)
        judge = Judge(torch.from_numpy(y), np.zeros(100, int), group, 20)
        assert judge.names["group"] == ["many"]
        with pytest.raises(ValueError, match="min_cell=99"):
            Judge(torch.from_numpy(y), np.zeros(100, int), group, 99)

    def test_outputs_of_any_shape(self):
        assert torch.equal(logits_of(torch.tensor([0.5]), nn.BCELoss()), torch.tensor([[0.0, 0.0]]))
        one = logits_of(torch.tensor([2.0]), nn.BCEWithLogitsLoss())
        assert torch.equal(one, torch.tensor([[0.0, 2.0]]))
        with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
            logits_of(torch.zeros(3, 2, 2), nn.CrossEntropyLoss())
