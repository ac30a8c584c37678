"""Which number, seen without groups, ranks models as the worst group's accuracy does?

    python -m benchmarks.schemes.selection

Reads the runs that `benchmarks.schemes.choosing` has left in benchmarks/results, those of one data
set together and each of them once. What is seen of a model, on one half of the test split, against
the true worst-group accuracy on the other half:

    by ...       Spearman's rank correlation over all runs
    picked ...   mean true worst-group accuracy of the model picked in each seed; "best" is what
                 whoever knew the groups of the other half would have picked, "mean" chance
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from scipy.stats import spearmanr

from benchmarks.schemes.results import RESULTS, save

SMALLER_IS_BETTER = ("mean loss", "tail loss")


def runs_of(data: str) -> list[dict[str, Any]]:
    """The runs on a data set: plain training, for one, is a row of three parts."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in ("alpha", "options", "schemes", "held"):
        path = RESULTS / f"schemes_choosing_{part}_{data}.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            rows.setdefault((row["seed"], row["mean loss"], row["accuracy"]), row)
    return list(rows.values())


def better(run: dict[str, Any], criterion: str) -> float:
    """What is seen of a run, larger for better."""
    return (-1 if criterion in SMALLER_IS_BETTER else 1) * float(run["visible"][criterion])


def main() -> None:
    correlations, picked = [], []
    for data in ("adult", "law"):
        runs = runs_of(data)
        seeds = sorted({run["seed"] for run in runs})
        for grouping in [k for k in runs[0] if k.startswith("worst ") and " x " in k]:
            start = {"data": data, "true": grouping.removeprefix("worst "), "runs": len(runs)}
            truth = [run[grouping] for run in runs]
            by_seed = [[run for run in runs if run["seed"] == seed] for seed in seeds]
            correlation: dict[str, Any] = dict(start)
            chosen: dict[str, Any] = dict(start)
            for seen in runs[0]["visible"]:
                values = [better(run, seen) for run in runs]
                correlation[f"by {seen}"] = float(spearmanr(values, truth).statistic)
                chosen[f"picked by {seen}"] = statistics.mean(
                    max(own, key=lambda run, seen=seen: better(run, seen))[grouping]  # type: ignore[misc]
                    for own in by_seed
                )
            chosen["picked, best"] = statistics.mean(max(r[grouping] for r in o) for o in by_seed)
            chosen["picked, mean"] = statistics.mean(truth)
            correlations.append(correlation)
            picked.append(chosen)
    save("schemes_selection", correlations, fast=False)
    save("schemes_selection_picked", picked, fast=False)


if __name__ == "__main__":
    main()
