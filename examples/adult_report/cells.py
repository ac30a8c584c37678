"""The table's cells, the same for the terminal and for the page."""

from __future__ import annotations

import math
from typing import NamedTuple

from adult_report.differences import difference
from adult_report.evaluation import METRICS, TAIL_LOSS
from adult_report.runs import PLAIN, Runs, mean_and_sd


class Cell(NamedTuple):
    """One number of the table.

    Attributes:
        mean: over the seeds.
        spread: "±" and the standard deviation over the seeds; empty for a single seed.
        verdict: beside plain training: ``"better"``, ``"worse"`` or ``"no clear difference"``.
    """

    mean: str
    spread: str
    verdict: str


def table_cells(runs: Runs) -> dict[str, list[Cell]]:
    """For each method a cell for each of `METRICS`."""
    metrics = runs.metrics()
    means, sds = mean_and_sd(metrics)
    return {
        method: [
            Cell(
                number(means.loc[method, metric.name], metric.percent),
                number(sds.loc[method, metric.name], metric.percent, sign="±"),
                difference(metrics, method, PLAIN, metric).verdict,
            )
            for metric in METRICS
        ]
        for method in runs.methods
    }


def number(value: float, percent: bool, sign: str = "") -> str:
    """Per cent with one digit or a loss with three; nothing for NaN.

    >>> number(0.8571, percent=True), number(0.3104, percent=False, sign="±")
    ('85.7', '±0.310')
    """
    if math.isnan(value):
        return ""
    return sign + (f"{100 * value:.1f}" if percent else f"{value:.3f}")


def legend(runs: Runs) -> dict[str, str]:
    """What each column is, with the α of the run."""
    return {
        metric.name: metric.meaning.replace("share α", f"{runs.alpha:.0%}")
        if metric is TAIL_LOSS
        else metric.meaning + (", in %" if metric.percent else "")
        for metric in METRICS
    }
