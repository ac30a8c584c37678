"""The fast version: a few runs anew, against the differences that the documentation states.

    python -m benchmarks.evidence recheck           # some minutes

Trains some methods on the data of the first five targets that is on this machine, seeds 0 to 2 (the
tests: on what is shipped), and compares the difference from plain training in the worst group with
the stored runs of the same seeds: it must lie within the interval that is stated for the mean of
all seeds, and where that is clear of 0, it must be on the same side. On the machine that made the
runs the two agree to the last digits; elsewhere rounding leads a little astray.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.data.tasks import TASKS, Task
from benchmarks.evidence.analysis import (
    FIRST_FIVE,
    Estimate,
    Target,
    estimate,
    target,
    with_setting,
)
from benchmarks.evidence.grid import FIXED, ON_CLEAN, Setting, told_the_groups, without_groups
from benchmarks.evidence.single import SAME_BY_LOSS
from benchmarks.evidence.sweep import RESULTS, sweep
from benchmarks.training import Recipe

SETTINGS = (
    "plain",
    "plain, moved threshold: 1",
    "class-balanced",
    "JTT: early 0.1, times 20",
    SAME_BY_LOSS,
    FIXED,
    ON_CLEAN,
    "IRW: α 0.1",
    "IRW, warm-up, class_balance: α 0.1",
    "IRW in classes, early S: α 0.2, center 1, floor 1, early 0.2",
)
SHIPPED = ("coloured_digits", "adult")
SEEDS = (0, 1, 2)
SLACK = 0.02
"""What rounding may do on another machine where the seeds happen to agree very well."""


class Recheck(NamedTuple):
    """A difference as stated for all seeds, its mean over the seeds run anew, and that anew."""

    what: str
    stated: Estimate
    stored: float
    found: float

    @property
    def holds(self) -> bool:
        near = abs(self.found - self.stored) <= max(self.stated.half, SLACK)
        clear = self.stated.verdict != "no clear difference"
        return near and (not clear or self.found * self.stated.mean > 0)

    def __str__(self) -> str:
        stated = f"stated {100 * self.stated.mean:+.1f} ± {100 * self.stated.half:.1f}"
        anew = f"these seeds {100 * self.stored:+.1f}, anew {100 * self.found:+.1f}"
        return f"{self.what}: {stated}; {anew}: {'holds' if self.holds else 'DOES NOT HOLD'}"


def run(folder: Path, tasks: tuple[str, ...] = SHIPPED) -> None:
    """Train anew, into tables in a folder."""

    def settings(task: Task, noise: float) -> Iterator[Setting]:
        yield from (setting for setting in without_groups() if setting.name in SETTINGS)
        yield from told_the_groups(task, targets_only=True)

    sweep([TASKS[name] for name in tasks], SEEDS, [0.0], folder, Recipe(), settings)


def compare(stored: Path, new: Path, tasks: tuple[str, ...] = SHIPPED) -> list[Recheck]:
    """Each stated difference beside the one found."""
    found = []
    for name, grouping in ((t, grouping) for t in tasks for grouping in TASKS[t].targets):
        then, now = target(stored, name, grouping), target(new, name, grouping)
        for setting in (*SETTINGS[1:], "oracle"):
            before, after = differences(then, setting), differences(now, setting)
            found.append(check(f"{name}, {grouping}, {setting}", before, after))
    return found


def differences(found: Target, setting: str) -> pd.Series:
    """From plain training, in the worst group's accuracy, by seed."""
    rows = found.oracle() if setting == "oracle" else with_setting(found, setting)
    return rows[found.worst] - found.plain()[found.worst]


def check(what: str, before: pd.Series, after: pd.Series) -> Recheck:
    """The seeds of ``after`` beside the same ones of ``before``."""
    stored = float(before.loc[after.index].mean())
    return Recheck(what, estimate(before), stored, float(after.mean()))


def main(given: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tasks = tuple(dict.fromkeys(name for name, _ in FIRST_FIVE if TASKS[name].available))
        run(Path(folder), tasks)
        found = compare(RESULTS, Path(folder), tasks)
    print(*found, sep="\n")
    sys.exit(sum(not one.holds for one in found))
