"""More than four groups, and a continuous one: does IRW help the worst age, race and sex on Adult?

UCI Adult without age, race and sex among the features; groups by deciles of age, by race and sex,
by all three (age in thirds), each with and without the label. 8,000 people to train on, drawn anew
for each seed; an MLP 64-32, Adam (1e-2, falling), 500 steps of 512, the last model, no selection.
The oracles are told the groups: they draw every group equally often, or take GroupDRO's steps.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks import report
from benchmarks.data.sources import Samples, Sizes, Source, adult, split
from benchmarks.methods.intrinsic import Intrinsic
from benchmarks.methods.objectives import class_balanced, group_balanced, group_dro, plain
from benchmarks.models import outputs_of
from benchmarks.training import Method, Recipe, cross_entropy, train

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
    "CVaR": lambda: Intrinsic(ALPHA, 0.0, {"weighting": "cvar"}),
    "IRW": lambda: Intrinsic(ALPHA),
    "IRW, warm-up, mix .5": lambda: Intrinsic(ALPHA, 1 / 3, {"mix": 0.5}),
    "IRW, warm-up, center 1": lambda: Intrinsic(ALPHA, 1 / 3, {"center": 1.0}),
    "oracle: balanced ages": lambda: group_balanced("age"),
    "oracle: GroupDRO, ages": lambda: group_dro("age"),
    "oracle: balanced label × age": lambda: group_balanced("label × age"),
    "oracle: GroupDRO, label × age": lambda: group_dro("label × age"),
    "oracle: balanced label × race × sex": lambda: group_balanced("label × race × sex"),
}
FAST = ("plain", "class-balanced", "IRW", "oracle: balanced ages")
ORACLES = {
    "age": "oracle: balanced ages",
    "label × age": "oracle: balanced label × age",
    "label × race × sex": "oracle: balanced label × race × sex",
}
LOOKS = {
    "plain": ("#999999", "o"),
    "class-balanced": ("#009E73", "v"),
    "IRW": ("#D55E00", "s"),
    "IRW, warm-up, center 1": ("#CC79A7", "D"),
    "oracle: balanced label × age": ("#0072B2", "^"),
}


def source() -> Source:
    """Adult, with age among the sensitive columns: in deciles and thirds of all people."""
    everything = adult()
    age = everything.features["age"]
    bins = {"age decile": quantile_bins(age, 10), "age third": quantile_bins(age, 3)}
    return replace(
        everything,
        features=everything.features.drop(columns="age"),
        numbers=[name for name in everything.numbers if name != "age"],
        sensitive=everything.sensitive.assign(**bins),
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
    """Accuracy; of each grouping the worst large group, by accuracy and loss; the ages' own."""
    losses = cross_entropy(logits, data.y).double()
    right = (logits.argmax(1) == data.y).double()
    found: dict[str, Any] = {"accuracy": float(right.mean()), "loss": float(losses.mean())}
    for name, codes in data.groups.items():
        large = [c for c in codes.unique().tolist() if (codes == c).sum() >= SMALLEST]
        groups = {data.names[name][c]: float(right[codes == c].mean()) for c in sorted(large)}
        which = min(groups, key=groups.__getitem__)
        found |= {f"{name}: worst": groups[which], f"{name}: which": which}
        found[f"{name}: worst loss"] = max(float(losses[codes == c].mean()) for c in large)
        found[f"{name}: groups"] = len(groups)
        if name in ("age", "label × age"):  # the figure's
            found |= {f"{name}, {group}": value for group, value in groups.items()}
    return found


def run(fast: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    recipe = Recipe(steps=60 if fast else 500)
    sizes, data, rows = Sizes(train=2000, test=6000) if fast else Sizes(), source(), []
    for seed in range(2 if fast else 5):
        training, _, test = split(data, seed, sizes)
        for name in FAST if fast else METHODS:
            model = train(training, METHODS[name](), recipe, seed)
            found = measures(outputs_of(model, test.x), test)
            rows.append({"method": name, "seed": seed, **found})
        print(f"seed {seed}", flush=True)
    return rows, {"steps": recipe.steps, "alpha": ALPHA}


def texts(frame: pd.DataFrame) -> dict[str, str]:
    runs = dict(list(frame.groupby("method", sort=False)))
    number = {name: int(frame[f"{name}: groups"].max()) for name in GROUPINGS}
    titles = [f"{name} ({number[name]})" for name in GROUPINGS]
    worst = ["accuracy", *(f"{name}: worst" for name in GROUPINGS)]
    percent = {name: (name, 1, 100) for name in worst}
    lost = {n: (n, 2, 1) for n in ("loss", *(f"{name}: worst loss" for name in GROUPINGS))}

    def change(method: str, column: str) -> str:
        return report.paired_text(runs[method][column], runs["plain"][column])

    def table(head: str, lines: list[list[str]]) -> str:
        return report.table(["", head, *titles], lines)

    shown = [[m, *report.cells(own, percent)] for m, own in runs.items()]
    changes = [[m, *(change(m, c) for c in worst)] for m in runs if m != "plain"]
    losses = [[m, *report.cells(own, lost)] for m, own in runs.items()]
    lines = []
    for grouping, oracle in ORACLES.items():
        column, plain_runs = f"{grouping}: worst", runs["plain"]
        methods = ("IRW", "IRW, warm-up, center 1", "class-balanced", oracle)
        text = "; ".join(f"{m} {change(m, column)}" for m in methods if m in runs)
        counts = plain_runs[f"{grouping}: which"].value_counts(sort=False)
        lines.append(
            f"- **{grouping}**: the worst group of plain training ({counts.idxmax()} in "
            f"{counts.max()} of {len(plain_runs)} seeds) has "
            f"{report.spread(plain_runs[column], 1, 100)} %. Change of the worst, in points: "
            f"{text}.\n"
        )
    return {
        "many_groups_worst": table("accuracy", shown),
        "many_groups_differences": table("accuracy", changes),
        "many_groups_losses": table("mean loss", losses),
        "many_groups_findings": "".join(lines),
    }


def draw(frame: pd.DataFrame) -> None:
    ages = [c.removeprefix("age, ") for c in frame if c.startswith("age, ")]
    panels = {
        "everybody": "age, ",
        "income up to 50,000": "label × age, 0, ",
        "income above 50,000": "label × age, 1, ",
    }
    with report.figure("many_groups.png", 1, 3, (11, 3.8), sharey=True) as (axes,):
        for axis, (title, start) in zip(axes, panels.items(), strict=True):
            places = [start + age for age in ages]
            for method, (colour, marker) in LOOKS.items():
                own = 100 * frame[frame["method"] == method].reindex(columns=places)
                means = own.mean(skipna=False)  # groups that are there in every seed
                look = {"color": colour, "marker": marker, "label": method, "lw": 1}
                axis.errorbar(range(len(ages)), means, own.std(), **look)
            report.ticks(axis, range(len(ages)), ages)
            axis.tick_params(axis="x", rotation=60)
            axis.set(title=title, xlabel="age")
        axes[0].set_ylabel("accuracy, %")
