"""Paired differences between two methods: same seed, same initialisation, same batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from adult_report.evaluation import Metric

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean difference of a metric over the seeds, and what may be said of it.

    Attributes:
        metric: which.
        mean: method minus baseline.
        sd: of the differences over the seeds; NaN for a single seed.
        seeds: how many.
    """

    metric: Metric
    mean: float
    sd: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether it lies outside the spread of the seeds: its t interval excludes 0."""
        if self.seeds < 2:
            return False
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, self.seeds - 1)
        return abs(self.mean) > quantile * self.sd / math.sqrt(self.seeds)

    @property
    def verdict(self) -> str:
        """``"better"``, ``"worse"`` or ``"no clear difference"``."""
        if not self.clear:
            return "no clear difference"
        return "better" if self.mean * self.metric.sign > 0 else "worse"

    def __str__(self) -> str:
        unit, scale, digits = (" points", 100, 1) if self.metric.percent else ("", 1, 3)
        spread = "" if self.seeds < 2 else f" ± {scale * self.sd:.{digits}f}"
        return f"{scale * self.mean:+.{digits}f}{spread}{unit}".replace("-", "−")


def difference(metrics: pd.DataFrame, method: str, baseline: str, metric: Metric) -> Difference:
    """``method`` minus ``baseline``.

    Args:
        metrics: one row a run, indexed by (method, seed).
        method: name.
        baseline: name.
        metric: a column of ``metrics``.

    >>> runs = pd.MultiIndex.from_product([["plain", "IRW"], [0, 1, 2]], names=["method", "seed"])
    >>> metrics = pd.DataFrame({"accuracy": [0.80, 0.81, 0.79, 0.83, 0.83, 0.82]}, index=runs)
    >>> found = difference(metrics, "IRW", "plain", Metric("accuracy", "", 1))
    >>> print(found, found.verdict)
    +2.7 ± 0.6 points better
    """
    paired = metrics.loc[method, metric.name] - metrics.loc[baseline, metric.name]
    return Difference(metric, float(paired.mean()), float(paired.std()), len(paired))
