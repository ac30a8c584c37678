"""The demo on UCI Adult: its data, its numbers, its sentences, and one small run of the whole."""

import base64
import doctest
import importlib
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from irw_optim import DBSCANFilter, IRWOptimizer

for library in ("jinja2", "matplotlib", "rich"):
    pytest.importorskip(library, reason="the examples need the report extra")
pd = pytest.importorskip("pandas", reason="the examples need the report extra")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

adult = importlib.import_module("adult")
adult_data = importlib.import_module("adult_data")
differences = importlib.import_module("adult_report.differences")
evaluation = importlib.import_module("adult_report.evaluation")
findings = importlib.import_module("adult_report.findings")
Diary = importlib.import_module("adult_report.diary").Diary


@pytest.fixture(scope="module")
def splits():
    return adult_data.load_adult()


def some(people, count):
    """Every so many people, of all groups."""
    chosen = np.arange(0, len(people), len(people) // count)[:count]
    groups = people.groups.iloc[chosen].reset_index(drop=True)
    return adult_data.People(people.features[chosen], people.labels[chosen], groups)


@pytest.mark.parametrize("name", ["adult_data", "adult_report.cells", "adult_report.differences"])
def test_examples_in_docstrings(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted
    assert not outcome.failed


class TestData:
    def test_is_the_official_split(self, splits):
        train, test = splits
        assert (len(train), len(test)) == (32561, 16281)
        # 24.08 % and 23.62 % of them earn more than 50,000 dollars
        assert train.labels.sum() == 7841
        assert test.labels.sum() == 3846

    def test_race_and_sex_are_no_features(self, splits, tmp_path):
        table = pd.read_csv(adult_data.DATA)
        swapped = table.assign(
            race=table["race"].to_numpy()[::-1], sex=table["sex"].to_numpy()[::-1]
        )
        swapped.to_csv(tmp_path / "swapped.csv", index=False)
        for one, other in zip(splits, adult_data.load_adult(tmp_path / "swapped.csv"), strict=True):
            np.testing.assert_array_equal(one.features, other.features)

    def test_nothing_is_fitted_on_the_test_split(self, splits, tmp_path):
        table = pd.read_csv(adult_data.DATA)
        in_test = table["split"] == "test"
        table.loc[in_test, "age"] += 1000
        table.loc[in_test, "workclass"] = "never seen"
        table.to_csv(tmp_path / "changed.csv", index=False)
        train, test = adult_data.load_adult(tmp_path / "changed.csv")
        np.testing.assert_array_equal(train.features, splits[0].features)
        assert test.features[:, 0].min() > 10
        assert np.isfinite(test.features).all()

    def test_features_are_standardised_and_groups_aligned(self, splits):
        train, _ = splits
        numbers = train.features[:, : len(adult_data.NUMBERS)].astype(np.float64)
        np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(numbers.std(0), 1, atol=1e-6)
        assert ((train.groups["income"] == ">50K") == train.labels).all()


class TestTraining:
    @pytest.mark.parametrize("inner", ["sgd", "adam"])
    def test_plain_is_plain(self, splits, inner):
        """What the others are compared with is the inner optimizer without us."""
        people = some(splits[0], 600)
        # Adam moves a parameter as far for a gradient that is all rounding: so, in float64.
        people = replace(people, features=people.features.astype(np.float64))
        trained = []
        for wrap in (True, False):
            torch.manual_seed(3)
            model = adult.network(people.features.shape[1]).double()
            criterion = nn.CrossEntropyLoss()
            kind, rate = adult.INNER[inner]
            optimizer = kind(model.parameters(), lr=rate)
            if wrap:
                diary = Diary(people.labels)
                arguments = adult.methods(steps=6)[adult.PLAIN]
                optimizer = IRWOptimizer(
                    optimizer, alpha=0.3, model=model, criterion=criterion, **arguments
                )
            else:
                optimizer.last_step = None
                diary = SimpleNamespace(note=lambda step, who: None)
            assert list(adult.train(model, criterion, optimizer, people, 2, diary)) == [0, 1]
            trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        torch.testing.assert_close(*trained, rtol=1e-7, atol=1e-9)

    def test_the_methods_are_the_ones_named(self):
        methods = adult.methods(steps=90)
        assert methods["IRW"] == {}
        assert methods["CVaR"] == {"weighting": "cvar"}
        assert methods["class-balanced"] == {"weighting": "uniform", "class_balance": True}
        assert methods["IRW, centred"] == {"center": 1.0, "warmup_steps": 30}
        assert methods["IRWO"] == {"outliers": DBSCANFilter()}


class TestEvaluation:
    def test_against_a_loop_over_the_people(self, splits):
        people, alpha = some(splits[1], 400), 0.3
        logits = torch.randn(len(people), 2)
        found = evaluation.evaluate(logits, people, alpha).metrics

        right: dict[str, list[bool]] = {}
        by_income: dict[str, list[bool]] = {}
        losses = []
        for i, (race, sex, income) in enumerate(people.groups.itertuples(index=False)):
            correct = bool(logits[i].argmax() == people.labels[i])
            right.setdefault(race + sex, []).append(correct)
            by_income.setdefault(income + sex, []).append(correct)
            losses.append(-float(logits[i].log_softmax(0)[people.labels[i]]))
        shares = [np.mean(group) for group in right.values()]
        overall = np.mean([c for group in right.values() for c in group])
        expected = {
            "accuracy": overall,
            "worst race × sex": min(shares),
            "worst income × sex": min(np.mean(group) for group in by_income.values()),
            "MAD": max(shares) - min(shares),
            "TAD": sum(abs(share - overall) for share in shares),
            "mean loss": np.mean(losses),
            "VAR": np.var(losses),
            "tail loss": np.mean(sorted(losses)[-120:]),
        }
        assert list(found) == [metric.name for metric in evaluation.METRICS]
        assert found == pytest.approx(expected, rel=1e-5)

    def test_the_moved_threshold_is_the_share_of_the_second_class(self):
        labels = np.array([0] * 30 + [1] * 10)
        logits = torch.randn(200, 2)
        moved = evaluation.moved_threshold(logits, labels).argmax(1).bool()
        assert torch.equal(moved, logits.softmax(1)[:, 1] > 0.25)


def step(weights, outliers=None, warmup=False):
    weights = torch.tensor(weights)
    removed = torch.zeros(len(weights), dtype=torch.bool)
    return SimpleNamespace(
        weights=weights,
        outliers=removed if outliers is None else torch.tensor(outliers),
        worst_off=torch.full((len(weights),), not warmup),
        effective_sample_size=float(1 / weights.square().sum()),
    )


class TestDiary:
    def test_shares_of_groups_and_classes(self):
        diary = Diary(np.array([0, 0, 1, 1]))
        group = pd.Series(["a", "b", "b", "b"])
        diary.note(step([0.5, 0.5], warmup=True), torch.tensor([0, 1]))
        diary.note(step([0.5, 0.5, 0.0], [False, False, True]), torch.tensor([0, 2, 3]))
        diary.note(step([0.75, 0.25]), torch.tensor([1, 3]))
        # without the warm-up, "a" was seen once in five times and had 0.5 of the weight of 2
        assert dict(diary.weight_ratio(group)) == pytest.approx({"a": 1.25, "b": 0.9375})
        assert dict(diary.removed_share(group)) == pytest.approx({"a": 0.0, "b": 0.25})
        assert diary.largest_class_share() == pytest.approx((0.5 + 0.75) / 2)

    def test_epochs(self):
        diary = Diary(np.array([0, 1]))
        diary.note(step([0.5, 0.5], warmup=True), torch.tensor([0, 1]))
        diary.note(step([1.0, 0.0]), torch.tensor([0, 1]))
        diary.close_epoch(2.0)
        diary.note(step([1.0, 0.0]), torch.tensor([0, 1]))
        diary.close_epoch(1.0)
        history = diary.history()
        assert list(history.index) == [1, 2]
        assert list(history["effective share"]) == [0.75, 0.5]
        assert list(history["tail loss"]) == [2.0, 1.0]


def two_methods(one, other, metric="accuracy"):
    index = pd.MultiIndex.from_product(
        [["plain", "IRW"], range(len(one))], names=["method", "seed"]
    )
    return pd.DataFrame({metric: [*one, *other]}, index=index)


values = st.floats(0.01, 0.99).map(lambda value: round(value, 3))


class TestDifferences:
    @given(st.lists(st.tuples(values, values), min_size=2, max_size=8))
    def test_clear_is_what_the_paired_t_test_calls_significant(self, pairs):
        one, other = (np.array(side) for side in zip(*pairs, strict=True))
        if np.ptp(np.round(other - one, 6)) == 0:
            return  # the test's p is undefined there
        frame = two_methods(one, other)
        found = differences.difference(frame, "IRW", "plain", evaluation.ACCURACY)
        p = stats.ttest_rel(other, one).pvalue
        assert found.clear == (p < 1 - differences.CONFIDENCE)

    @pytest.mark.parametrize(("mean", "clear"), [(2.4, False), (2.6, True), (-2.6, True)])
    def test_the_limit_for_three_seeds(self, mean, clear):
        # sd 1, t quantile 4.303 with 2 degrees of freedom: the limit is 4.303 / sqrt(3) = 2.484
        frame = two_methods([0, 0, 0], [mean - 1, mean, mean + 1])
        assert differences.difference(frame, "IRW", "plain", evaluation.ACCURACY).clear == clear

    def test_lower_is_better_where_it_is(self):
        frame = two_methods([1.0, 1.1, 1.2], [0.5, 0.61, 0.69], "tail loss")
        down = differences.difference(frame, "IRW", "plain", evaluation.TAIL_LOSS)
        up = differences.difference(frame, "plain", "IRW", evaluation.TAIL_LOSS)
        assert (down.verdict, up.verdict) == ("better", "worse")
        assert str(down) == "−0.500 ± 0.010"

    def test_one_seed_is_never_clear(self):
        found = differences.difference(
            two_methods([0.1], [0.9]), "IRW", "plain", evaluation.ACCURACY
        )
        assert (found.verdict, str(found)) == ("no clear difference", "+80.0 points")


class TestFindings:
    def frame(self, **changes):
        """Three seeds of plain training, and of IRW with the given changes to its metrics."""
        noise = np.array([0.000, 0.001, -0.001])
        plain = {metric.name: 0.5 + noise for metric in evaluation.METRICS}
        irw = {
            name: value + changes.get(name.split()[0], 0) + noise for name, value in plain.items()
        }
        frames = [pd.DataFrame(plain), pd.DataFrame(irw)]
        return pd.concat(frames, keys=["plain", "IRW"], names=["method", "seed"])

    def test_gains_losses_and_neither_are_said_alike(self):
        said = findings.headline(self.frame(accuracy=-0.02, worst=0.10), "IRW")
        assert "raised the accuracy of the worst group of race × sex (+10.0 ± 0.1 points)" in said
        assert "lowered the accuracy of everybody (−2.0 ± 0.1 points)" in said
        said = findings.headline(self.frame(worst=-0.10), "IRW")
        assert "lowered the accuracy of the worst group of race × sex (−10.0" in said
        assert "did not clearly change the accuracy of everybody (+0.0" in said

    def test_a_comparison_names_every_metric_once(self):
        said = findings.comparison(self.frame(accuracy=-0.02, MAD=-0.1), "IRW", "plain")
        assert said.startswith("IRW against plain. Better: MAD (−10.0")
        assert "worse: accuracy (−2.0" in said
        for metric in evaluation.METRICS:
            assert said.count(f"{metric.name} (") == 1

    def test_a_tail_bought_with_the_mean_is_said(self):
        said = findings.tail_and_mean(self.frame(tail=-0.2, mean=0.1))
        assert len(said) == 2
        assert "tail loss 0.50 → 0.30, mean loss 0.50 → 0.60, which is 52% of the way" in said[1]
        assert len(findings.tail_and_mean(self.frame(tail=-0.2, mean=-0.1))) == 1


class Page(HTMLParser):
    """What a browser would load, and what a reader would read."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_whole_demo_on_some_of_the_people(splits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adult, "load_adult", lambda: (some(splits[0], 1200), some(splits[1], 1500)))
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "new folder" / "report.html"
    adult.main(["--seeds", "2", "--epochs", "2", "--output", str(output)])

    printed = capsys.readouterr().out
    assert str(output) in printed
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    read = " ".join(" ".join(page.words).split())

    methods = [*adult.methods(1), adult.MOVED]
    assert page.tags.count("td") == len(methods) * len(evaluation.METRICS)
    for method in methods:
        assert method in read
    # the terminal and the page say the same
    sentences = re.findall(r"• (.*?)(?=•|\n\n)", printed, re.DOTALL)
    assert len(sentences) > 20
    for sentence in sentences:
        assert " ".join(sentence.split()) in read

    # nothing is loaded from anywhere, and the figures are whole
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert "url(" not in text
    assert len(page.loaded) == 5
    for uri in page.loaded:
        kind, data = uri.split(",")
        assert kind == "data:image/svg+xml;base64"
        assert ET.fromstring(base64.b64decode(data)).tag.endswith("svg")
