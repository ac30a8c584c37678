"""Which number, seen without groups, ranks models as the worst group's accuracy does?

    python -m benchmarks.schemes selection

Reads the runs that `choosing` has stored, those of one data set together and each of them once.
What is seen of a model, on one half of the test split, against the true worst-group accuracy on the
other half:

    by ...       Spearman's rank correlation over all runs
    picked ...   mean true worst-group accuracy of the model picked in each seed; "best" is what
                 whoever knew the groups of the other half would have picked, "mean" chance
"""

from __future__ import annotations

import pandas as pd
from scipy.stats import spearmanr

from benchmarks import report

PARTS = ("alpha", "options", "schemes", "held")


def runs_of(data: str) -> pd.DataFrame:
    """The runs on a data set: plain training, for one, is a row of three parts."""
    runs = pd.concat([report.stored(f"schemes_choosing_{part}_{data}") for part in PARTS])
    return runs.drop_duplicates(["seed", "mean loss", "accuracy"]).reset_index(drop=True)


def better(runs: pd.DataFrame, seen: str) -> pd.Series:
    """What is seen of each run, larger for better."""
    return (-1 if seen in ("mean loss", "tail loss") else 1) * runs[f"visible {seen}"]


def main(given: list[str]) -> None:
    report.options(__doc__, given)
    correlations, picked = [], []
    for data in ("adult", "law"):
        runs = runs_of(data)
        seeds = runs["seed"]
        visible = [c.removeprefix("visible ") for c in runs if c.startswith("visible ")]
        for grouping in [c for c in runs if c.startswith("worst ") and " x " in c]:
            start = {"data": data, "true": grouping.removeprefix("worst "), "runs": len(runs)}
            truth, by, chosen = runs[grouping], {}, {}
            for seen in visible:
                values = better(runs, seen)
                by[f"by {seen}"] = float(spearmanr(values, truth).statistic)
                chosen[f"picked by {seen}"] = truth[values.groupby(seeds).idxmax()].mean()
            chosen["picked, best"] = truth.groupby(seeds).max().mean()
            correlations.append(start | by)
            picked.append({**start, **chosen, "picked, mean": truth.mean()})
    report.save("schemes_selection", correlations, fast=False)
    report.save("schemes_selection_picked", picked, fast=False)
