"""The first figure of README, and what it says of it, are made of the stored runs of the demo."""

import pytest

from benchmarks import report
from benchmarks.evidence import demo


@pytest.fixture(scope="module")
def runs():
    return report.stored("demo")


def test_the_table_is_of_the_runs(runs):
    (text,) = demo.texts(runs).values()
    assert text == (report.RESULTS / "demo.md").read_text(encoding="utf-8")
    assert "results/demo.md" in (report.ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def test_groups_make_up_everybody(runs):
    """Accuracies of groups, weighted by their people, are the accuracy; worst is of each seed."""
    people = runs.attrs["people"]
    for columns in (demo.PEOPLE, demo.RACES):
        own = [name for name in people if name.startswith(" × ".join(columns))]
        shares = [people[name] / sum(people[n] for n in own) for name in own]
        assert (runs[own] @ shares).to_numpy() == pytest.approx(runs["accuracy"], abs=1e-5)
        worst = demo.with_worst(runs)[f"worst {' × '.join(columns)}"]
        assert (worst.to_numpy() == runs[own].to_numpy().min(1)).all()


def test_what_the_first_page_says_of_whom(runs):
    found = demo.with_worst(runs)

    def verdict(remedy, column):
        return demo.against_plain(found, remedy, column).verdict

    poor = [f"income × sex: <=50K, {sex}" for sex in ("Female", "Male")]
    rich = [f"income × sex: >50K, {sex}" for sex in ("Female", "Male")]
    for column in rich:
        assert verdict("IRW", column) != "higher"
        for remedy in ("two stages, by gradients", "moved threshold"):
            assert demo.against_plain(found, remedy, column).low > 0.15
    assert [verdict("IRW", column) == "higher" for column in poor] == [False, True]
    for column in poor:
        for remedy in ("two stages, by gradients", "moved threshold"):
            assert verdict(remedy, column) == "lower"
    tails = found.groupby("remedy")["tail loss"].mean()
    assert 0.45 < tails["IRW"] / tails["plain"] < 0.55
    for remedy in set(demo.SHOWN) - {"plain", "IRW", "CVaR", "IRWO"}:
        assert -0.072 < demo.against_plain(found, remedy, "worst race × sex").mean < -0.03
