"""Remedies beside plain training, seed by seed: means, intervals, and who fares worst."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from irw_optim.remedies._measuring import Judge, Numbers
from irw_optim.remedies._methods import PLAIN

if TYPE_CHECKING:
    import pandas as pd

ORACLE = "groups known (oracle)"
"""Plain training with its last layer fitted again, groups balanced: what there may be to gain."""

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """A remedy minus plain training, seed by seed.

    Attributes:
        mean: over the seeds.
        low: of its t interval over the seeds; NaN for a single seed.
        high: of the same.
    """

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired(values: Numbers, others: Numbers, confidence: float = CONFIDENCE) -> Difference:
    """The mean of the paired differences and its t interval.

    >>> found = paired(np.array([0.5, 0.6, 0.7]), np.array([0.4, 0.4, 0.4]))
    >>> print(f"{found.mean:.3f}, {found.low:.3f} to {found.high:.3f}")
    0.200, -0.048 to 0.448
    """
    from scipy import stats

    differences = np.asarray(values, float) - np.asarray(others, float)
    mean, number = float(differences.mean()), len(differences)
    if number < 2:
        return Difference(mean, np.nan, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, number - 1) * differences.std(ddof=1) / number**0.5
    return Difference(mean, mean - float(half), mean + float(half))


def worst_part(judge: Judge, kind: str, predicted: Numbers) -> tuple[Any, int, float]:
    """The part that fares worst on average over the seeds: name, people, accuracy."""
    found = judge.accuracies(kind, predicted == judge.labels).mean(0)
    worst = int(found.argmin())
    return judge.names[kind][worst], int(judge.sizes(kind)[worst]), float(found[worst])


def difference(runs: pd.DataFrame, remedy: str, metric: str, other: str = PLAIN) -> Difference:
    """Of one remedy to plain training, or to another."""
    return paired(runs.loc[remedy, metric].to_numpy(), runs.loc[other, metric].to_numpy())
