"""The sweep keeps what it has, the documentation shows what is stored, and it holds when rerun."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.data.planted import coloured_digits
from benchmarks.data.tasks import TASKS
from benchmarks.evidence import report, sweep, unseen
from benchmarks.evidence.analysis import read
from benchmarks.evidence.evaluation import evaluate
from benchmarks.evidence.grid import FIXED, settings_of, told_the_groups, without_groups
from benchmarks.evidence.sweep import RESULTS
from benchmarks.training import Recipe
from irw_optim.metrics import group_report

DIGITS = TASKS["coloured_digits"]
TINY = Recipe(steps=3, batch=32, widths=(4,))


@pytest.fixture
def tiny():
    """A few settings on digits."""

    def settings(task, noise):
        yield from (s for s in without_groups() if s.method.startswith("plain"))
        yield from told_the_groups(task)

    def run(folder, seeds=(0,)):
        sweep.sweep([DIGITS], seeds, [0.0], folder, TINY, settings)
        return read(folder, "coloured_digits")

    return run


class TestSweep:
    def test_goes_on_where_it_was(self, tiny, tmp_path):
        whole = tiny(tmp_path / "whole", seeds=(0, 1))
        path = tmp_path / "broken" / "coloured_digits.csv"
        path.parent.mkdir()
        lines = (tmp_path / "whole" / "coloured_digits.csv").read_text().splitlines(True)
        path.write_text("".join(lines[:4]))
        again = tiny(tmp_path / "broken", seeds=(0, 1))
        pd.testing.assert_frame_equal(again, whole)
        assert len(again) == len(whole) == 2 * 6  # plain, three thresholds, two oracles

    def test_a_moved_threshold_is_the_same_model(self, tiny, tmp_path):
        runs = tiny(tmp_path).set_index("setting")
        moved = runs.loc["plain, moved threshold: 1", "test accuracy"]
        assert runs.loc["plain", "told"] == ""
        assert 0 <= moved <= 1

    def test_every_setting_has_a_name_of_its_own(self):
        for task in TASKS.values():
            names = [setting.name for setting in settings_of(task)]
            assert len(names) == len(set(names))


def test_evaluation_agrees_with_the_report_of_the_library():
    pytest.importorskip("fairlearn")
    _, _, test = coloured_digits(seed=0)
    logits = 2 * np.random.default_rng(0).normal(size=(len(test), 2))
    logits = torch.from_numpy(logits)
    found = evaluate(logits, test, "label x colour", smallest=1)
    losses = torch.nn.functional.cross_entropy(logits, test.y, reduction="none")
    groups = test.groups["label x colour"]
    wanted = group_report(test.y, logits.argmax(1), groups, losses=losses, alpha=0.1)
    expected = {
        "worst label x colour": wanted.worst_group_accuracy,
        "MAD": wanted.mad,
        "TAD": wanted.tad,
        "VAR": wanted.loss_variance,
        "tail loss": wanted.worst_alpha_loss,
        "accuracy": wanted.overall["accuracy"],
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_groups_that_are_too_small_do_not_count():
    _, _, test = coloured_digits(seed=0)
    wrong_once = torch.nn.functional.one_hot(test.y, 2).double()
    wrong_once[0] = 1 - wrong_once[0]
    alone = dataclasses.replace(test, groups={"g": (torch.arange(len(test)) == 0).long()})
    assert evaluate(wrong_once, alone, "g", smallest=1)["worst g"] == 0
    assert evaluate(wrong_once, alone, "g", smallest=2)["worst g"] == 1


class TestStoredResults:
    def test_the_documentation_shows_the_stored_runs(self):
        for folder, texts in ((RESULTS, report.fragments()), (unseen.RESULTS, unseen.fragments())):
            for name, text in texts.items():
                assert (folder / name).read_text(encoding="utf-8") == text, name
            assert {path.name for path in folder.glob("*.md")} == set(texts)

    @pytest.mark.parametrize("page", ["reproduce.md", "should_i_use_it.md"])
    def test_the_pages_have_no_measured_number_of_their_own(self, page):
        """Their numbers are included from what is generated; a percentage or decimal is not."""
        text = (sweep.report.ROOT / "docs" / page).read_text(encoding="utf-8")
        prose = re.sub(
            r"```.*?```|`[^`]*`|\]\([^)]*\)|\d{4}\.\d{5}|95 %", "", text, flags=re.DOTALL
        )
        assert re.findall(r"\d+\.\d+|[−-]\d|\d+ ?%", prose) == []

    def test_there_are_five_seeds_of_every_setting(self):
        for name in ("coloured_digits", "adult", "law_school", "celeba_blond", "marked_adult"):
            runs = read(RESULTS, name)
            runs = runs[runs["noise"] == 0]
            seeds = runs.groupby("setting")["seed"].nunique()
            assert seeds.min() == seeds.max() >= 5
            expected = {setting.name for setting in settings_of(TASKS[name])}
            assert expected <= set(seeds.index)

    def test_unseen_data_has_ten_seeds_and_five_with_flips(self):
        for name, task in (unseen.UNSEEN | unseen.SEEN).items():
            runs = read(unseen.RESULTS, name)
            for noise, least in ((unseen.CLEAN, 10), (unseen.FLIPS, 5)):
                own = runs[runs["noise"] == noise].groupby("setting")["seed"].nunique()
                assert {setting.name for setting in unseen.unseen(task)} == set(own.index), name
                assert own.min() >= least, name

    def test_the_files_are_small(self):
        for path in [*RESULTS.iterdir(), *unseen.RESULTS.iterdir()]:
            assert path.stat().st_size < 200_000, path


@pytest.mark.slow
def test_runs_anew_are_the_stored_ones_but_for_rounding():
    settings = [s for s in without_groups() if s.name in ("plain", "IRW: α 0.1", FIXED)]
    for name in ("coloured_digits", "adult"):
        task = TASKS[name]
        stored = read(RESULTS, name).query("noise == 0 and seed == 0").set_index("setting")
        for row in sweep.rows_of(task, 0, 0.0, Recipe(), settings):
            for column in ("test accuracy", f"test worst {task.targets[0]}"):
                assert abs(row[column] - stored.loc[row["setting"], column]) < 0.05, row
