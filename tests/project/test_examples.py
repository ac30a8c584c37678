"""The demo on UCI Adult: its data, and one small run of the whole."""

import doctest
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

for library in ("jinja2", "matplotlib", "tqdm"):
    pytest.importorskip(library, reason="the examples need the report extra")
pd = pytest.importorskip("pandas", reason="the examples need the report extra")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

adult = importlib.import_module("adult")
adult_data = importlib.import_module("adult_data")


@pytest.fixture(scope="module")
def splits():
    return adult_data.load_adult()


def some(people, count):
    """Every so many people, of all groups."""
    chosen = np.arange(0, len(people), len(people) // count)[:count]
    groups = people.groups.iloc[chosen].reset_index(drop=True)
    return adult_data.People(people.features[chosen], people.labels[chosen], groups)


def test_examples_in_docstrings():
    outcome = doctest.testmod(adult_data)
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


def test_the_whole_demo_on_some_of_the_people(splits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adult, "load_adult", lambda: (some(splits[0], 1200), some(splits[1], 1500)))
    output = tmp_path / "new folder" / "report.html"
    adult.main(["--seeds", "2", "--epochs", "2", "--output", str(output)])

    printed = capsys.readouterr().out
    assert str(output) in printed
    for method in (*adult.REMEDIES, "CVaR", "IRWO"):
        assert printed.count(f"{method} ") >= 2  # the comparison, and race × sex
    text = output.read_text(encoding="utf-8")
    assert "<svg" in text
    assert text.count("<details>") == 6
