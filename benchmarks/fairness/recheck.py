"""The fast version: a few runs anew, against the differences that the documentation states.

    python -m benchmarks.fairness.recheck           # about two minutes

Trains some methods on what is on this machine, seeds 0 to 2, and compares the difference from plain
training in the worst group with the stored runs: it must lie in their 99 % prediction interval for
a mean of three seeds, and have their sign where they are clear of 0.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from benchmarks.fairness.analysis import Target, estimate, target, with_setting
from benchmarks.fairness.grid import Setting, told_the_groups, without_groups
from benchmarks.fairness.loop import Recipe
from benchmarks.fairness.sweep import RESULTS, sweep
from benchmarks.fairness.tasks import TASKS, Task

SETTINGS = (
    "plain",
    "plain, moved threshold: 1",
    "class-balanced",
    "JTT: early 0.1, times 20",
    "IRW: α 0.3",
    "IRW, warm-up, center: α 0.3, center 1",
    "IRW in classes, early S: α 0.2, center 0, floor 1, early 0.2",
)
SHIPPED = ("coloured_digits", "adult")
SEEDS = (0, 1, 2)
LEVEL = 0.99


@dataclass(frozen=True)
class Recheck:
    """One stated difference, and the one found now."""

    what: str
    stated: float
    half: float
    clear: bool
    found: float

    @property
    def holds(self) -> bool:
        same_sign = self.found * self.stated > 0
        return abs(self.found - self.stated) <= self.half and (same_sign or not self.clear)

    def __str__(self) -> str:
        mark = "holds" if self.holds else "DOES NOT HOLD"
        stated = f"stated {100 * self.stated:+.1f} ± {100 * self.half:.1f}"
        return f"{self.what}: {stated}, found {100 * self.found:+.1f}: {mark}"


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
                before = differences(then, setting)
                after = float(differences(now, setting).mean())
                found.append(check(f"{name}, {grouping}, {what}", before, after, len(SEEDS)))
    return found


def differences(found: Target, setting: str | None) -> np.ndarray:
    """From plain training, in the worst group's accuracy, one a seed; None for the oracle."""
    rows = found.oracle() if setting is None else with_setting(found, setting)
    return np.asarray(rows[found.worst] - found.plain()[found.worst])


def check(what: str, before: np.ndarray, after: float, seeds: int) -> Recheck:
    """The new mean against the prediction interval of the stored differences."""
    n = len(before)
    quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    half = float(quantile * before.std(ddof=1) * math.sqrt(1 / n + 1 / seeds))
    clear = estimate(before).verdict != "no clear difference"
    return Recheck(what, float(before.mean()), half, clear, after)


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder))
        found = compare(RESULTS, Path(folder))
    print(*found, sep="\n")
    return sum(not one.holds for one in found)


if __name__ == "__main__":
    sys.exit(main())
