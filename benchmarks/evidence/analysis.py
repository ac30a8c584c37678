"""From the runs to what may be said: choice of settings, paired differences, headroom recovered.

    headroom recovered = (method - plain) / (oracle - plain)

of the worst-off group's test accuracy, where the oracle is the better of group balancing and
GroupDRO by validation. Every seed has a split of its own, and all methods of a seed share it: what
is compared are paired differences, with t intervals over the seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.data.tasks import TASKS, UNSEEN, Task
from benchmarks.evidence.grid import ORACLES, PLAIN, PLANTED
from benchmarks.report import interval

WITH, WITHOUT = "with groups", "without groups"
ACCURACY = "test accuracy"
FIRST_FIVE = [
    ("coloured_digits", "label x colour"),
    ("adult", "label x sex"),
    ("law_school", "label x sex"),
    ("law_school", "label x race"),
    ("celeba_blond", "label x male"),
]
"""The targets of the headline mean: fixed before the runs."""


class Estimate(NamedTuple):
    """A mean over the seeds, and half the width of its 95 % t interval; NaN for a single seed."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def verdict(self) -> str:
        """``"higher"``, ``"lower"`` or ``"no clear difference"`` from 0."""
        if not self.low * self.high > 0:  # NaN included
            return "no clear difference"
        return "higher" if self.mean > 0 else "lower"


def estimate(values: pd.Series | np.ndarray) -> Estimate:
    """Mean and t interval of independent values.

    >>> found = estimate(np.array([1.0, 2.0, 3.0]))
    >>> round(found.mean, 2), round(found.half, 2), found.verdict
    (2.0, 2.48, 'no clear difference')
    """
    return Estimate(*interval(values))


def linearised(above: pd.Series | np.ndarray, below: pd.Series | np.ndarray) -> np.ndarray:
    """For each seed its term of the ratio of the means of paired values, linearised.

    >>> linearised(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    array([0.5, 0.5, 0.5])
    """
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    found = above.mean() / below.mean()
    return found + (above - found * below) / below.mean()


def best_of_each_seed(runs: pd.DataFrame, by: str) -> pd.DataFrame:
    """For each seed the run with the largest value of a column; indexed by seed."""
    return runs.loc[runs.groupby("seed")[by].idxmax()].set_index("seed").sort_index()


@dataclass(frozen=True, eq=False)
class Target:
    """A grouping of a task's people whose worst-off group is looked at.

    Attributes:
        runs: of the task, at one share of noise, with the seeds that are complete.
    """

    task: str
    grouping: str
    runs: pd.DataFrame

    @property
    def worst(self) -> str:
        return f"test worst {self.grouping}"

    @property
    def title(self) -> str:
        return f"{(TASKS | UNSEEN)[self.task].title} {self.grouping.replace(' x ', ' × ')}"

    def chosen(self, methods: str | tuple[str, ...], by: str) -> pd.DataFrame:
        """For each seed the run of the methods' best setting by validation; indexed by seed.

        `WITH` takes the worst group's validation accuracy, `WITHOUT` the worst accuracies over
        label x cluster and over the classes (`irw_optim.metrics`).
        """
        return _chosen(self, (methods,) if isinstance(methods, str) else methods, by)

    def setting(self, name: str) -> pd.DataFrame:
        """The runs of one setting, indexed by seed."""
        return self.runs[self.runs["setting"] == name].set_index("seed").sort_index()

    def plain(self) -> pd.DataFrame:
        return self.chosen(PLAIN, WITH)

    def oracle(self) -> pd.DataFrame:
        return self.chosen(ORACLES, WITH)

    def terms(self, rows: pd.DataFrame) -> np.ndarray:
        """For each seed its term of the share of the headroom that the runs recover."""
        plain = self.plain()[self.worst]
        return linearised(rows[self.worst] - plain, self.oracle()[self.worst] - plain)

    def recovered(self, rows: pd.DataFrame) -> Estimate:
        """The share of the headroom that the runs, one a seed, recover."""
        return estimate(self.terms(rows))

    def headroom(self) -> Estimate:
        """What the oracle gains over plain training."""
        return self.difference(self.oracle(), self.plain(), self.worst)

    def difference(self, one: pd.DataFrame, other: pd.DataFrame, metric: str) -> Estimate:
        """Paired by seed."""
        return estimate(one[metric] - other[metric])


@cache
def _chosen(found: Target, methods: tuple[str, ...], by: str) -> pd.DataFrame:
    rows = found.runs[found.runs["method"].isin(methods)]
    rows = rows[rows["told"].isin(["", found.grouping])]
    seen = f"validation worst {found.grouping}" if by == WITH else "score without groups"
    return best_of_each_seed(rows, seen)


# Reading --------------------------------------------------------------------------------------


def read(folder: Path, task: str) -> pd.DataFrame:
    """The runs of a task, in the order in which they ran."""
    table = pd.read_csv(folder / f"{task}.csv", keep_default_na=False)
    return table.drop_duplicates(["noise", "seed", "setting"])


def target(folder: Path, task: str, grouping: str, noise: float = 0.0) -> Target:
    """One grouping of one task, with the seeds for which every setting has run."""
    runs = read(folder, task)
    runs = runs[runs["noise"] == noise]
    by_seed = runs.groupby("seed")["setting"].nunique()
    complete = by_seed[by_seed == by_seed.max()].index
    return Target(task, grouping, runs[runs["seed"].isin(complete)])


def targets(folder: Path, noise: float = 0.0, tasks: Mapping[str, Task] = TASKS) -> list[Target]:
    """The groupings with the label in them, of all tasks that have run."""
    pairs = [(task.name, grouping) for task in tasks.values() for grouping in task.targets]
    return _of_all(folder, pairs, noise)


def protected(folder: Path) -> list[Target]:
    """The groupings by people (race x sex, male x young), of all tasks that have run."""
    pairs = [(task.name, task.protected) for task in TASKS.values() if task.name not in PLANTED]
    return _of_all(folder, pairs, 0.0)


def _of_all(folder: Path, pairs: Iterable[tuple[str, str]], noise: float) -> list[Target]:
    """Those that have runs, with the seeds that all of them have."""
    there = [pair for pair in pairs if (folder / f"{pair[0]}.csv").exists()]
    found = [one for pair in there if len((one := target(folder, *pair, noise)).runs)]
    common = set.intersection(*(set(one.runs["seed"]) for one in found)) if found else set()
    return [replace(one, runs=one.runs[one.runs["seed"].isin(common)]) for one in found]


def first_five(found: Iterable[Target]) -> list[Target]:
    return [t for t in found if (t.task, t.grouping) in FIRST_FIVE]


def noisy_targets(folder: Path, noise: float) -> list[Target]:
    """Those of the first five that have runs with so many flipped labels."""
    return first_five(targets(folder, noise))


# Over several targets, each with its picked runs, one a seed ----------------------------------

Pick = Callable[[Target], pd.DataFrame]
"""`Target.plain`, `Target.oracle`, or what `of` and `best` make."""


def of(setting: str) -> Pick:
    return lambda t: t.setting(setting)


def best(methods: str | tuple[str, ...], by: str = WITHOUT) -> Pick:
    return lambda t: t.chosen(methods, by)


def recovered_by_seed(found: Sequence[Target], pick: Pick) -> np.ndarray:
    """For each seed its term of the mean recovered: two methods' terms are paired."""
    return np.mean([t.terms(pick(t)) for t in found], axis=0)


def mean_recovered(found: Sequence[Target], pick: Pick, less: Pick | None = None) -> Estimate:
    """The mean over targets of the headroom recovered, or how much more than another recovers."""
    terms = recovered_by_seed(found, pick)
    return estimate(terms if less is None else terms - recovered_by_seed(found, less))


def mean_change(
    found: Sequence[Target], pick: Pick, metric: str = "", other: Pick = Target.plain
) -> Estimate:
    """From plain training, in the worst group's accuracy: mean over targets, paired by seed."""
    changes = [np.asarray(pick(t)[metric or t.worst] - other(t)[metric or t.worst]) for t in found]
    return estimate(np.mean(changes, axis=0))


# Cells of tables ------------------------------------------------------------------------------


def share(value: float) -> str:
    """A share of 1 with two digits.

    >>> share(0.734), share(-0.049), share(1.2), share(-1.0), share(10.5)
    ('.73', '−.05', '1.20', '−1.00', '10.50')
    """
    text = f"{abs(value):.2f}"
    return ("−" if round(value, 2) < 0 else "") + text.removeprefix("0")


def spread(found: Estimate) -> str:
    return f"{share(found.mean)} ± {share(found.half)}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def marked(found: Estimate) -> str:
    """Points with half the interval; bold where the interval excludes 0."""
    text = f"{points(found.mean)} ± {percent(found.half)}"
    return text if found.verdict == "no clear difference" else f"**{text}**"


def cost(found: Sequence[Target], pick: Pick) -> str:
    """In accuracy, against plain training, mean over the targets."""
    return points(mean_change(found, pick, ACCURACY).mean)


def room(found: Target) -> str:
    """The worst group's accuracy, plain and with the oracle."""
    return " → ".join(percent(runs[found.worst].mean()) for runs in (found.plain(), found.oracle()))
