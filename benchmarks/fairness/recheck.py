"""The fast version: a few runs anew, against the differences that the documentation states.

    python -m benchmarks.fairness.recheck           # some minutes

Trains some methods on the data of the first five targets that is on this machine, seeds 0 to 2 (the
tests: on what is shipped), and compares the difference from plain training in the worst group with
the stored runs of the same seeds: it must lie within the interval that is stated for the mean of
all seeds, and where that is clear of 0, it must be on the same side. On the machine that made the
runs the two agree to the last digit; elsewhere rounding leads a little astray.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from benchmarks.fairness.analysis import Estimate, Target, estimate, target, with_setting
from benchmarks.fairness.grid import FIXED, ON_CLEAN, Setting, told_the_groups, without_groups
from benchmarks.fairness.loop import Recipe
from benchmarks.fairness.single import SAME_BY_LOSS
from benchmarks.fairness.sweep import RESULTS, sweep
from benchmarks.fairness.tables import FIRST_FIVE
from benchmarks.fairness.tasks import TASKS, Task

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


@dataclass(frozen=True)
class Recheck:
    """A stated difference and the one found now.

    Attributes:
        what: is compared.
        stated: with its interval, over all seeds that are stored.
        stored: mean over the seeds that were run anew.
        found: the same, anew.
    """

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
        yield from (s for s in told_the_groups(task) if s.told in task.targets)

    sweep([TASKS[name] for name in tasks], SEEDS, [0.0], folder, Recipe(), settings)


def compare(stored: Path, new: Path, tasks: tuple[str, ...] = SHIPPED) -> list[Recheck]:
    """Each stated difference beside the one found."""
    found = []
    for name in tasks:
        for grouping in TASKS[name].targets:
            then, now = target(stored, name, grouping), target(new, name, grouping)
            named = {s: s for s in SETTINGS if s != "plain"} | {f"oracle, {grouping}": None}
            for what, setting in named.items():
                before, after = differences(then, setting), differences(now, setting)
                found.append(check(f"{name}, {grouping}, {what}", before, after))
    return found


def differences(found: Target, setting: str | None) -> pd.Series[float]:
    """From plain training, in the worst group's accuracy, by seed; None for the oracle."""
    rows = found.oracle() if setting is None else with_setting(found, setting)
    return rows[found.worst] - found.plain()[found.worst]


def check(what: str, before: pd.Series[float], after: pd.Series[float]) -> Recheck:
    """The seeds of ``after`` beside the same ones of ``before``."""
    stored = float(before.loc[after.index].mean())
    return Recheck(what, estimate(before), stored, float(after.mean()))


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tasks = tuple(dict.fromkeys(name for name, _ in FIRST_FIVE if TASKS[name].available))
        run(Path(folder), tasks)
        found = compare(RESULTS, Path(folder), tasks)
    print(*found, sep="\n")
    return sum(not one.holds for one in found)


if __name__ == "__main__":
    sys.exit(main())
