"""Who gains and who loses on UCI Adult: what `make demo` compares, group by group.

python -m benchmarks.evidence demo             # minutes of one core
python -m benchmarks.evidence demo --again     # README's table and figure of what is stored
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pandas as pd

from benchmarks import report
from benchmarks.evidence.analysis import Estimate, estimate
from benchmarks.evidence.dots import Look, Row, draw_rows
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
    "plain": ("plain training", "#000000", "o"),
    "IRW": ("IRW: one line changed", "#0072B2", "^"),
    "two stages, by gradients": ("two stages, by IRW's weights", "#009E73", "s"),
    "moved threshold": ("threshold moved, no training", "#D55E00", "D"),
}
"""What it is called, colour (of Okabe and Ito's) and marker."""
GROUPS = {
    ">50K, Female": "women above $50,000",
    ">50K, Male": "men above $50,000",
    "<=50K, Female": "women up to $50,000",
    "<=50K, Male": "men up to $50,000",
}


def draw(frame: pd.DataFrame) -> None:
    """Who is decided rightly, before and after; and the losses of the worst tenth."""
    people, start = frame.attrs["people"], _prefix(PEOPLE)
    everybody = sum(n for name, n in people.items() if name.startswith(start))
    looks = {label: Look(*look) for label, *look in LOOKS.values()}

    def row(column: str, said: str) -> Row:
        runs = dict(list(frame.groupby("remedy")[column]))
        return Row(said, {LOOKS[remedy][0]: estimate(runs[remedy]) for remedy in LOOKS})

    groups = [row(start + g, f"{said}\n{people[start + g]:,}") for g, said in GROUPS.items()]
    size, heights = (4.8, 4.9), {"height_ratios": [1 + len(groups), 1.25]}
    with report.figure("whom.png", 2, 1, size, 180, 2, gridspec_kw=heights) as ((top,), (low,)):
        draw_rows(top, [row("accuracy", f"everybody\n{everybody:,} people"), *groups], looks)
        draw_rows(low, [row("tail loss", "the tenth with\nthe largest losses")], looks, scale=1)
        look = {"fontsize": 9.5, "fontweight": "bold"}
        top.set_title("UCI Adult: people decided rightly, in %", **look)
        low.set_title("Mean loss: less is better", **look)
        top.set(xlim=(45, 100))
        low.set(xlim=(0, None))
        for axis in (top, low):
            axis.grid(axis="x", color="#e4e4e4", zorder=0)
            axis.set_axisbelow(True)
