"""More than four groups, and a continuous one: does IRW help the worst age, race and sex on Adult?

    python -m benchmarks.experiments.many_groups [--fast]

UCI Adult without age, race and sex among the features; groups by deciles of age, by race and sex,
by all three (age in thirds), each with and without the label. 8,000 people to train on, drawn anew
for each seed; an MLP 64-32, Adam (1e-3), 500 steps of 256, the last model, no selection. The
oracles are told the groups: they draw every group equally often, or take GroupDRO's steps.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from benchmarks.experiments import report
from benchmarks.fairness.data import Samples, Sizes, Source, adult, split
from benchmarks.fairness.loop import Method, Recipe, scores, train
from benchmarks.fairness.methods.intrinsic import Intrinsic
from benchmarks.fairness.methods.objectives import (
    class_balanced,
    cvar,
    group_balanced,
    group_dro,
    plain,
)

ALPHA, SMALLEST = 0.3, 40
GROUPINGS = {
    "age": ["age decile"],
    "race × sex": ["race", "sex"],
    "age × race × sex": ["age third", "race", "sex"],
    "label × age": ["label", "age decile"],
    "label × race × sex": ["label", "race", "sex"],
    "label × age × race × sex": ["label", "age third", "race", "sex"],
}
METHODS: dict[str, Callable[[], Method]] = {
    "plain": plain,
    "class-balanced": class_balanced,
    "CVaR": lambda: cvar(ALPHA),
    "IRW": lambda: Intrinsic(ALPHA),
    "IRW, warm-up, mix .5": lambda: Intrinsic(ALPHA, 1 / 3, {"mix": 0.5}),
    "IRW, warm-up, center 1": lambda: Intrinsic(ALPHA, 1 / 3, {"center": 1.0}),
    "oracle: balanced ages": lambda: group_balanced("age"),
    "oracle: GroupDRO, ages": lambda: group_dro("age"),
    "oracle: balanced label × age": lambda: group_balanced("label × age"),
    "oracle: GroupDRO, label × age": lambda: group_dro("label × age"),
    "oracle: balanced label × race × sex": lambda: group_balanced("label × race × sex"),
}


def source() -> Source:
    """Adult, with age among the sensitive columns: in deciles and thirds of all people."""
    everything = adult()
    age = everything.features["age"]
    return replace(
        everything,
        features=everything.features.drop(columns="age"),
        numbers=[name for name in everything.numbers if name != "age"],
        sensitive=everything.sensitive.assign(
            **{"age decile": quantile_bins(age, 10), "age third": quantile_bins(age, 3)}
        ),
        groupings=GROUPINGS,
    )


def quantile_bins(values: pd.Series, number: int) -> pd.Series:
    """A column of bins with about as many people each, named so that they sort by age.

    >>> list(quantile_bins(pd.Series([17, 20, 30, 60, 90]), 2))
    ['17-29', '17-29', '30-90', '30-90', '30-90']
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, number + 1)).astype(int))
    edges[-1] = values.max() + 1
    names = [f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]
    return pd.cut(values, edges, right=False, labels=names).astype(str)


def measures(logits: torch.Tensor, data: Samples) -> dict[str, Any]:
    """Accuracy; for each grouping every large group's accuracy and mean loss, and the worst."""
    losses = F.cross_entropy(logits, data.y, reduction="none").double()
    right = (logits.argmax(1) == data.y).double()
    found: dict[str, Any] = {"accuracy": float(right.mean()), "loss": float(losses.mean())}
    for name, codes in data.groups.items():
        large = [c for c in codes.unique().tolist() if (codes == c).sum() >= SMALLEST]
        accuracies = {data.names[name][c]: float(right[codes == c].mean()) for c in sorted(large)}
        found[name] = {
            "worst": min(accuracies.values()),
            "gap": max(accuracies.values()) - min(accuracies.values()),
            "worst loss": max(float(losses[codes == c].mean()) for c in large),
            "groups": accuracies,
        }
    return found


def run(fast: bool) -> report.Result:
    recipe = Recipe(steps=60 if fast else 500)
    sizes = Sizes(train=2000, test=6000) if fast else Sizes()
    seeds = range(2 if fast else 5)
    data = source()
    chosen = METHODS if not fast else {k: METHODS[k] for k in FAST}
    runs = []
    for seed in seeds:
        training, _, test = split(data, seed, sizes)
        runs.append(
            {
                name: measures(scores(train(training, method(), recipe, seed), test.x), test)
                for name, method in chosen.items()
            }
        )
        for name, grouping in itertools.product(chosen, GROUPINGS):
            if name != "plain" and grouping not in ("age", "label × age"):  # the figure's
                del runs[-1][name][grouping]["groups"]
        print(f"seed {seed}", flush=True)
    return {"steps": recipe.steps, "seeds": list(seeds), "alpha": ALPHA, "runs": runs}


FAST = ("plain", "class-balanced", "IRW", "oracle: balanced ages")
ORACLES = {
    "age": "oracle: balanced ages",
    "label × age": "oracle: balanced label × age",
    "label × race × sex": "oracle: balanced label × race × sex",
}


def texts(result: report.Result) -> dict[str, str]:
    runs = result["runs"]
    groupings = [name for name in GROUPINGS if name in runs[0]["plain"]]
    number = {name: max(len(r["plain"][name]["groups"]) for r in runs) for name in groupings}
    columns = ["", "accuracy", *(f"{name} ({number[name]})" for name in groupings)]
    worst, differences, losses = [], [], []
    for method in runs[0]:
        of = [r[method] for r in runs]
        accuracy = [r["accuracy"] for r in of]
        row = [method, report.spread(accuracy, 1, 100)]
        change = [method, report.paired_text(accuracy, [r["plain"]["accuracy"] for r in runs])]
        lost = [method, report.spread([r["loss"] for r in of])]
        for name in groupings:
            own = [r[name]["worst"] for r in of]
            row.append(report.spread(own, 1, 100))
            change.append(report.paired_text(own, [r["plain"][name]["worst"] for r in runs]))
            lost.append(report.spread([r[name]["worst loss"] for r in of]))
        worst.append(row)
        if method != "plain":
            differences.append(change)
        losses.append(lost)
    return {
        "many_groups_worst": report.table(columns, worst),
        "many_groups_differences": report.table(columns, differences),
        "many_groups_losses": report.table(["", "mean loss", *columns[2:]], losses),
        "many_groups_findings": findings(result),
    }


def findings(result: report.Result) -> str:
    runs = result["runs"]
    lines = []
    for grouping, oracle in ORACLES.items():
        plain_values = [r["plain"][grouping]["worst"] for r in runs]
        text = []
        for method in ("IRW", "IRW, warm-up, center 1", "class-balanced", oracle):
            if method in runs[0]:
                own = [r[method][grouping]["worst"] for r in runs]
                text.append(f"{method} {report.paired_text(own, plain_values)}")
        worst = [min(r["plain"][grouping]["groups"].items(), key=lambda g: g[1])[0] for r in runs]
        most = statistics.mode(worst)
        lines.append(
            f"- **{grouping}**: the worst group of plain training ({most} in {worst.count(most)} "
            f"of {len(runs)} seeds) has {report.spread(plain_values, 1, 100)} %. Change of the "
            f"worst, in points: {'; '.join(text)}."
        )
    return "\n".join(lines) + "\n"


def draw(result: report.Result, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        "plain": ("#999999", "o"),
        "class-balanced": ("#009E73", "v"),
        "IRW": ("#D55E00", "s"),
        "IRW, warm-up, center 1": ("#CC79A7", "D"),
        "oracle: balanced label × age": ("#0072B2", "^"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    runs = result["runs"]
    ages = list(runs[0]["plain"]["age"]["groups"])
    panels = {
        "everybody": [("age", name) for name in ages],
        "income up to 50,000": [("label × age", f"0, {name}") for name in ages],
        "income above 50,000": [("label × age", f"1, {name}") for name in ages],
    }
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        for method, (colour, marker) in looks.items():
            points = []
            for place, (grouping, group) in enumerate(groups):
                found = [r[method][grouping]["groups"].get(group) for r in runs]
                values = [100 * v for v in found if v is not None]
                if len(values) == len(runs):
                    points.append((place, statistics.mean(values), statistics.stdev(values)))
            where, means, spreads = zip(*points, strict=True)
            axis.errorbar(
                where, means, spreads, color=colour, marker=marker, label=method, linewidth=1
            )
        axis.set_xticks(range(len(ages)), ages, rotation=60, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("age")
        axis.grid(color="#e4e4e4")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(folder / "many_groups.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
