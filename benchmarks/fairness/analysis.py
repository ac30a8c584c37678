"""From the runs to what may be said: choice of settings, paired differences, headroom recovered.

    headroom recovered = (method - plain) / (oracle - plain)

of the worst-off group's test accuracy, where the oracle is the better of group balancing and
GroupDRO by validation. Every seed has a split of its own, and all methods of a seed share it: what
is compared are paired differences, with t intervals over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.fairness.grid import ORACLES, PLAIN, PLANTED
from benchmarks.fairness.tasks import TASKS

CONFIDENCE = 0.95
WITH, WITHOUT = "with groups", "without groups"


@dataclass(frozen=True)
class Estimate:
    """A mean over the seeds with its interval.

    Attributes:
        mean: the estimate.
        half: half the width of its 95 % t interval; NaN for a single seed.
        seeds: how many.
    """

    mean: float
    half: float
    seeds: int

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
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()), math.nan, n)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return Estimate(float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(n)), n)


def ratio(above: pd.Series | np.ndarray, below: pd.Series | np.ndarray) -> Estimate:
    """Ratio of the means of paired values, with the interval of its linearisation.

    The ratio's error is close to mean(above_i - ratio below_i) / mean(below): a t interval of that.

    >>> found = ratio(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    >>> found.mean, found.half
    (0.5, 0.0)
    """
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    found = above.mean() / below.mean()
    error = estimate((above - found * below) / below.mean())
    return Estimate(float(found), error.half, len(above))


def read(folder: Path, task: str) -> pd.DataFrame:
    """The runs of a task, in the order in which they ran."""
    table = pd.read_csv(folder / f"{task}.csv", keep_default_na=False)
    return table.drop_duplicates(["noise", "seed", "setting"])


@dataclass(frozen=True)
class Target:
    """A grouping of a task's people whose worst-off group is looked at.

    Attributes:
        task: its name.
        grouping: of the task.
        runs: of the task, at one share of noise, with the seeds that are complete.
    """

    task: str
    grouping: str
    runs: pd.DataFrame

    @property
    def worst(self) -> str:
        return f"test worst {self.grouping}"

    def chosen(self, methods: str | tuple[str, ...], by: str) -> pd.DataFrame:
        """For each seed the run of the best setting, by what validation shows; indexed by seed.

        Args:
            methods: whose settings there are to choose from.
            by: `WITH` takes the worst group's validation accuracy, `WITHOUT` the worst accuracies
                over label x cluster and over the classes (`irw_optim.metrics`).
        """
        methods = (methods,) if isinstance(methods, str) else methods
        rows = self.runs[self.runs["method"].isin(methods)]
        rows = rows[rows["told"].isin(["", self.grouping])]
        seen = f"validation worst {self.grouping}" if by == WITH else "score without groups"
        best = rows.groupby("seed")[seen].idxmax()
        return rows.loc[best].set_index("seed").sort_index()

    def plain(self) -> pd.DataFrame:
        return self.chosen(PLAIN, WITH)

    def oracle(self) -> pd.DataFrame:
        return self.chosen(ORACLES, WITH)

    def recovered(self, rows: pd.DataFrame) -> Estimate:
        """The share of the headroom that the runs, one a seed, recover."""
        plain = self.plain()[self.worst]
        return ratio(rows[self.worst] - plain, self.oracle()[self.worst] - plain)

    def headroom(self) -> Estimate:
        """What the oracle gains over plain training."""
        return estimate(self.oracle()[self.worst] - self.plain()[self.worst])

    def difference(self, one: pd.DataFrame, other: pd.DataFrame, metric: str) -> Estimate:
        """Paired by seed."""
        return estimate(one[metric] - other[metric])


def target(folder: Path, task: str, grouping: str, noise: float = 0.0) -> Target:
    """One grouping of one task, with the seeds for which every setting has run."""
    runs = read(folder, task)
    runs = runs[runs["noise"] == noise]
    by_seed = runs.groupby("seed")["setting"].nunique()
    complete = by_seed[by_seed == by_seed.max()].index
    return Target(task, grouping, runs[runs["seed"].isin(complete)])


def targets(folder: Path, noise: float = 0.0) -> list[Target]:
    """The groupings with headroom, of all tasks that have run."""
    return with_common_seeds(
        target(folder, task.name, grouping, noise)
        for task in TASKS.values()
        if (folder / f"{task.name}.csv").exists()
        for grouping in task.targets
    )


def protected(folder: Path) -> list[Target]:
    """The groupings by people (race x sex, male x young), of all tasks that have run."""
    return with_common_seeds(
        target(folder, task.name, task.protected)
        for task in TASKS.values()
        if (folder / f"{task.name}.csv").exists() and task.name not in PLANTED
    )


def with_common_seeds(found: Iterable[Target]) -> list[Target]:
    """Those that have runs, with the seeds that all of them have."""
    found = [one for one in found if len(one.runs)]
    common = set.intersection(*(set(one.runs["seed"]) for one in found)) if found else set()
    return [replace(one, runs=one.runs[one.runs["seed"].isin(common)]) for one in found]


def mean_recovered(found: Sequence[Target], rows: Sequence[pd.DataFrame]) -> Estimate:
    """The mean over targets of the headroom recovered."""
    return estimate(recovered_by_seed(found, rows))


def recovered_by_seed(found: Sequence[Target], rows: Sequence[pd.DataFrame]) -> np.ndarray:
    """For each seed its term of the linearised mean: two methods' terms are paired."""
    terms = []
    for one, runs in zip(found, rows, strict=True):
        plain = one.plain()[one.worst]
        above, below = runs[one.worst] - plain, one.oracle()[one.worst] - plain
        recovered = above.mean() / below.mean()
        terms.append(np.asarray(recovered + (above - recovered * below) / below.mean()))
    return np.asarray(np.mean(terms, axis=0))


def one_setting(found: Sequence[Target], methods: tuple[str, ...]) -> str:
    """The setting with the best mean score without groups over all tasks and seeds."""
    runs = pd.concat({t.task: t.runs for t in found})
    runs = runs[runs["method"].isin(methods)]
    return str(runs.groupby("setting")["score without groups"].mean().idxmax())


def with_setting(found: Target, setting: str) -> pd.DataFrame:
    """The runs of one setting, indexed by seed."""
    return found.runs[found.runs["setting"] == setting].set_index("seed").sort_index()
