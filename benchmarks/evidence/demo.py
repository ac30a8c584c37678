"""Who gains and who loses on UCI Adult: what `make demo` compares, group by group.

python -m benchmarks.evidence demo             # minutes of one core
python -m benchmarks.evidence demo --again     # README's table and figure of what is stored
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pandas as pd

from benchmarks import report
from benchmarks.evidence.analysis import Estimate, estimate
from irw_optim.remedies import Comparison

PEOPLE, RACES = ("income", "sex"), ("race", "sex")
PLAIN = "plain"
SHOWN = {
    "plain": "plain training",
    "moved threshold": "plain, moved threshold",
    "class-balanced": "class-balanced",
    "balanced, half the steps": "class-balanced, half the steps",
    "two stages, by losses": "two stages, by losses",
    "two stages, by gradients": "two stages, by gradients",
    "IRW": "IRW, as in the paper",
    "IRW, centred": "IRW, `center=1` after a warm-up",
    "CVaR": "CVaR",
    "IRWO": "IRWO",
}
"""README's rows."""
COLUMNS = {
    "accuracy": ("accuracy", 1),
    "worst income × sex": ("worst group of income × sex", 1),
    "worst race × sex": ("worst group of race × sex", 1),
    "tail loss": ("tail loss", -1),
}
"""Its columns, and whether more is better."""


def run(fast: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each remedy and seed, and how many people each group has."""
    sys.path.insert(0, str(report.ROOT / "examples"))
    demo, data = import_module("adult"), import_module("adult_data")
    seeds, epochs = (1, 1) if fast else (5, 12)
    options = Namespace(seeds=seeds, epochs=epochs, alpha=0.3, optimizer="sgd")
    found: Comparison = demo.compare(options)[0]
    test = data.load_adult()[1]
    groups = {name: test.group_of(*name) for name in (PEOPLE, RACES)}
    rows = []
    for remedy, predicted in found.predictions.items():
        for seed, one in enumerate(predicted):
            right = pd.Series(one == test.labels)
            numbers = found.runs.loc[(remedy, seed), ["accuracy", "tail loss", "calibration error"]]
            row = {"remedy": remedy, "seed": seed, **numbers}
            for columns, group in groups.items():
                row |= right.groupby(group.to_numpy()).mean().add_prefix(_prefix(columns))
            rows.append(row)
    people = {
        _prefix(columns) + name: number
        for columns, group in groups.items()
        for name, number in group.value_counts().items()
    }
    return rows, {"people": people, "settings": dict(found.settings)}


def _prefix(columns: Sequence[str]) -> str:
    return " × ".join(columns) + ": "


def texts(frame: pd.DataFrame) -> dict[str, str]:
    """README's table: ▲ and ▼ where the interval of the difference to plain excludes 0."""
    found = with_worst(frame)
    lines = []
    for remedy, name in SHOWN.items():
        cells = []
        for column, (_, sign) in COLUMNS.items():
            scale, digits = (1, 2) if column == "tail loss" else (100, 1)
            change = against_plain(found, remedy, column).verdict
            mark = {"higher": " ▲▼"[sign], "lower": " ▼▲"[sign]}.get(change, "").strip()
            value = found.loc[found["remedy"] == remedy, column].mean()
            cells.append(f"{scale * value:.{digits}f} {mark}".strip())
        lines.append([name, *cells])
    head = ["method", *(name for name, _ in COLUMNS.values())]
    return {"demo": report.table(head, lines)}


def with_worst(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with the accuracy of the worst group of each seed."""
    found = frame.copy()
    for columns in (PEOPLE, RACES):
        own = [c for c in frame if c.startswith(_prefix(columns))]
        found[f"worst {' × '.join(columns)}"] = frame[own].min(axis=1)
    return found


def against_plain(frame: pd.DataFrame, remedy: str, column: str) -> Estimate:
    """The difference to plain training, seed by seed."""
    by_seed = frame.set_index(["remedy", "seed"])[column]
    return estimate(by_seed[remedy] - by_seed[PLAIN])


# Figure ---------------------------------------------------------------------------------------

LOOKS = {
    "plain": ("plain training", "#000000", "o", "white"),
    "IRW": ("IRW: one line changed", "#0072B2", "^", None),
    "two stages, by gradients": ("two stages, by IRW's weights", "#009E73", "s", None),
    "moved threshold": ("threshold moved, no training", "#D55E00", "D", None),
}
"""What it is called, colour (of Okabe and Ito's), marker, and what the marker is filled with."""
GROUPS = {
    ">50K, Female": "women above $50,000",
    ">50K, Male": "men above $50,000",
    "<=50K, Female": "women up to $50,000",
    "<=50K, Male": "men up to $50,000",
}


def draw(frame: pd.DataFrame) -> None:
    """Who is decided rightly, before and after; and the losses of the worst tenth."""
    people = frame.attrs["people"]
    everybody = sum(n for name, n in people.items() if name.startswith(_prefix(PEOPLE)))
    rows = {"accuracy": f"everybody\n{everybody:,} people"}
    for group, said in GROUPS.items():
        rows[_prefix(PEOPLE) + group] = f"{said}\n{people[_prefix(PEOPLE) + group]:,}"
    size, heights = (4.8, 4.9), {"height_ratios": [len(rows), 1.25]}
    with report.figure("whom.png", 2, 1, size, 180, 2, gridspec_kw=heights) as ((top,), (low,)):
        _dots(top, frame, rows, 100)
        _dots(low, frame, {"tail loss": "the tenth with\nthe largest losses"}, 1)
        top.set(xlim=(45, 100))
        low.set(xlim=(0, None))
        for axis, title in (
            (top, "UCI Adult: people decided rightly, in %"),
            (low, "Mean loss: less is better"),
        ):
            axis.set_title(title, fontsize=9.5, fontweight="bold")


def _dots(axis: Any, frame: pd.DataFrame, rows: dict[str, str], scale: float) -> None:
    for place, column in enumerate(rows):
        for step, (remedy, (label, colour, marker, filled)) in enumerate(LOOKS.items()):
            found = estimate(frame.loc[frame["remedy"] == remedy, column])
            axis.errorbar(
                scale * found.mean,
                place + 0.2 * (step - 1.5),
                xerr=scale * found.half,
                label=None if place else label,
                color=colour,
                marker=marker,
                markerfacecolor=filled or colour,
                ms=6,
                ls="",
            )
        if place:
            axis.axhline(place - 0.5, color="#dddddd", lw=0.6, zorder=0)
    axis.set_yticks(range(len(rows)), list(rows.values()))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e4e4e4", zorder=0)
    axis.set_axisbelow(True)
