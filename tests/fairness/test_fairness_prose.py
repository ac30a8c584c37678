"""What the pages on the evidence say in words, without a number, is so in the stored runs."""

import numpy as np
import pytest

from benchmarks.fairness.analysis import WITH, WITHOUT, estimate, protected, target, targets
from benchmarks.fairness.claims import mean_change_between
from benchmarks.fairness.sweep import RESULTS, RESULTS_SLOW
from benchmarks.fairness.tables import IRW, first_five, mean_recovered, noisy_targets

FLIPPED = 0.2


@pytest.fixture(scope="module")
def five():
    return first_five(targets(RESULTS))


@pytest.fixture(scope="module")
def digits():
    return target(RESULTS, "coloured_digits", "label x colour")


def test_plain_training_serves_groups_of_people_about_as_well_as_the_oracle():
    for found in protected(RESULTS):
        assert found.headroom().verdict != "higher", found.task
        assert found.headroom().mean < 0.02, found.task


def test_no_method_serves_them_clearly_better_on_average():
    found = protected(RESULTS)
    for method in (*IRW, "class-balanced", "JTT", "ARL"):
        rows = [t.chosen(method, WITHOUT) for t in found]
        change = [
            np.asarray(r[t.worst] - t.plain()[t.worst]) for t, r in zip(found, rows, strict=True)
        ]
        assert estimate(np.mean(change, axis=0)).verdict != "higher", method


def test_groups_with_the_label_and_shortcuts_have_headroom():
    for found in targets(RESULTS):
        assert found.headroom().verdict == "higher", (found.task, found.grouping)


def test_balancing_does_nothing_for_a_shortcut_and_jtt_nearly_everything(digits):
    for method in ("plain, moved threshold", "class-balanced"):
        assert digits.recovered(digits.chosen(method, WITHOUT)).mean < 0.1
    assert digits.recovered(digits.chosen("JTT", WITHOUT)).mean > 0.8


def test_the_choice_without_groups_prefers_users_of_the_shortcut(digits):
    assert digits.recovered(digits.chosen(IRW, WITH)).mean > 0.8
    assert digits.recovered(digits.chosen(IRW, WITHOUT)).mean < 0.1


def test_weights_held_for_an_epoch_collapse(five):
    for use in ("reweighting", "resampling"):
        rows = [t.chosen(f"IRW, global {use}", WITHOUT) for t in five]
        assert mean_recovered(five, rows).high < 0


def test_tail_loss_falls_and_mean_loss_rises():
    for found in protected(RESULTS):
        rows = found.chosen("IRW", WITHOUT)
        assert found.difference(rows, found.plain(), "test tail loss").verdict == "lower"
        assert found.difference(rows, found.plain(), "test mean loss").verdict == "higher"


def test_a_model_for_label_x_group_is_worse_for_groups_of_people():
    for task, grouping, people in (
        ("adult", "label x sex", "race x sex"),
        ("law_school", "label x sex", "race x sex"),
        ("celeba_blond", "label x male", "male x young"),
    ):
        found = target(RESULTS, task, grouping)
        rows = found.chosen(IRW, WITH)
        assert found.difference(rows, found.plain(), f"test worst {people}").mean < 0, task


def test_flips_ruin_jtt_and_hurt_irw_much_less():
    noisy = noisy_targets(RESULTS, FLIPPED)
    clean = [target(RESULTS, t.task, t.grouping) for t in noisy]

    def fall(method):
        falls = [
            (b.chosen(method, WITHOUT)[b.worst] - a.chosen(method, WITHOUT)[a.worst]).mean()
            for a, b in zip(clean, noisy, strict=True)
        ]
        return float(np.mean(falls))

    assert fall("JTT") < -0.3
    assert fall("IRW") > -0.1
    assert fall("IRW, warm-up, center") > -0.1


def test_the_outlier_filter_is_no_remedy_for_flips():
    for noise in (0.05, 0.1, FLIPPED):
        found = noisy_targets(RESULTS, noise)
        assert mean_change_between(found, "IRWO", "IRW").verdict != "higher"


def test_irw_recovers_more_with_the_slow_recipe(five):
    slow = first_five(targets(RESULTS_SLOW))
    for method in ("IRW", "IRW, warm-up, center", "IRW in classes, early S"):
        quick, slowly = (
            mean_recovered(found, [t.chosen(method, WITHOUT) for t in found]).mean
            for found in (five, slow)
        )
        assert slowly > quick, method
