"""The tables of the documentation, as Markdown, from the runs that are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.fairness.analysis import (
    WITH,
    WITHOUT,
    Estimate,
    Target,
    estimate,
    protected,
    targets,
    with_setting,
)
from benchmarks.fairness.grid import ORACLES, PLAIN

SHORT = {
    "coloured_digits": "digits",
    "adult": "Adult",
    "law_school": "Law",
    "celeba_blond": "CelebA blond",
    "marked_adult": "Adult",
    "compas": "COMPAS",
    "celeba_hair": "CelebA hair",
}
FIRST_FIVE = [
    ("coloured_digits", "label x colour"),
    ("adult", "label x sex"),
    ("law_school", "label x sex"),
    ("law_school", "label x race"),
    ("celeba_blond", "label x male"),
]
"""The targets of the headline mean: fixed before the runs, and not changed after them."""


def title(found: Target) -> str:
    return f"{SHORT[found.task]} {found.grouping.replace(' x ', ' × ')}"


def methods_of(runs: pd.DataFrame, told: bool = False) -> list[str]:
    """The methods that have run, in their order; the oracles last, if asked for."""
    names = list(dict.fromkeys(runs["method"]))
    return [name for name in names if name not in ORACLES]


def first_five(found: Iterable[Target]) -> list[Target]:
    return [t for t in found if (t.task, t.grouping) in FIRST_FIVE]


def mean_recovered(found: Sequence[Target], rows: Sequence[pd.DataFrame]) -> Estimate:
    """The mean over targets of the headroom recovered; the seeds are the repetitions."""
    values = []
    for one, runs in zip(found, rows, strict=True):
        plain = one.plain()[one.worst]
        above, below = runs[one.worst] - plain, one.oracle()[one.worst] - plain
        share = above.mean() / below.mean()
        values.append(share + (above - share * below) / below.mean())
    return estimate(np.mean([np.asarray(v) for v in values], axis=0))


def mean_accuracy_change(found: Sequence[Target], rows: Sequence[pd.DataFrame]) -> Estimate:
    changes = [
        np.asarray(runs["test accuracy"] - one.plain()["test accuracy"])
        for one, runs in zip(found, rows, strict=True)
    ]
    return estimate(np.mean(changes, axis=0))


def headroom_table(folder: Path) -> str:
    """Headroom recovered, chosen with / without groups on validation."""
    found = targets(folder)
    five = first_five(found)
    head = ["method", *(title(t) for t in found), "mean of the first five", "accuracy, points"]
    lines = []
    for method in methods_of(found[1].runs):
        if method == PLAIN:
            continue
        chosen = {by: [t.chosen(method, by) for t in found] for by in (WITH, WITHOUT)}
        cells = [
            " / ".join(share(t.recovered(chosen[by][i]).mean) for by in chosen)
            for i, t in enumerate(found)
        ]
        of_five = {by: [t.chosen(method, by) for t in five] for by in (WITH, WITHOUT)}
        means = " / ".join(spread(mean_recovered(five, rows)) for rows in of_five.values())
        accuracy = " / ".join(
            points(mean_accuracy_change(five, rows).mean) for rows in of_five.values()
        )
        lines.append([method, *cells, means, accuracy])
    room = [
        f"{percent(t.plain()[t.worst].mean())} → {percent(t.oracle()[t.worst].mean())}"
        for t in found
    ]
    lines.append(["*plain → oracle, %*", *room, "", ""])
    return markdown(head, lines)


def protected_table(folder: Path) -> str:
    """Worst group by people: paired differences from plain training, in points."""
    found = protected(folder)
    head = ["method", *(title(t) for t in found)]
    lines = []
    for method in methods_of(found[0].runs):
        if method == PLAIN:
            continue
        cells = []
        for t in found:
            chosen = (t.chosen(method, by) for by in (WITH, WITHOUT))
            differences = (t.difference(rows, t.plain(), t.worst) for rows in chosen)
            cells.append(" / ".join(marked(d) for d in differences))
        lines.append([method, *cells])
    oracles = [marked(t.headroom()) for t in found]
    lines.append(["*oracle*", *oracles])
    plain = [
        f"{percent(t.plain()[t.worst].mean())} ± {percent(t.plain()[t.worst].std())}" for t in found
    ]
    lines.append(["*plain, %*", *plain])
    return markdown(head, lines)


METRICS = ("accuracy", "worst", "MAD", "TAD", "mean loss", "VAR", "tail loss")


def metrics_table(found: Target, by: str = WITHOUT) -> str:
    """All metrics of one task: mean ± standard deviation over the seeds."""
    head = ["method", *(m if m != "worst" else f"worst {found.grouping}" for m in METRICS)]
    lines = []
    for method in [*methods_of(found.runs), ORACLES]:
        rows = found.oracle() if method == ORACLES else found.chosen(method, by)
        cells = []
        for metric in METRICS:
            column = found.worst if metric == "worst" else f"test {metric}"
            scale, digits = (1, 3) if "loss" in metric or metric == "VAR" else (100, 1)
            change = found.difference(rows, found.plain(), column)
            star = {"higher": "▲", "lower": "▼"}.get(change.verdict, "")
            mean, sd = scale * rows[column].mean(), scale * rows[column].std()
            cells.append(f"{mean:.{digits}f} ± {sd:.{digits}f}{star}")
        lines.append(["*oracle*" if method == ORACLES else method, *cells])
    return markdown(head, lines)


def noise_table(folder: Path, noises: Sequence[float], methods: Sequence[str]) -> str:
    """Worst-off group under flipped labels: points from plain training with the same flips."""
    head = ["method, chosen without groups", *(f"{noise:.0%} flipped" for noise in noises)]
    found = {noise: first_five(targets(folder, noise)) for noise in noises}
    found = {noise: [t for t in some if len(t.runs)] for noise, some in found.items()}
    lines = []
    for method in methods:
        cells = []
        for some in found.values():
            changes = [
                np.asarray(t.chosen(method, WITHOUT)[t.worst] - t.plain()[t.worst]) for t in some
            ]
            cells.append(marked(estimate(np.mean(changes, axis=0))))
        lines.append([method, *cells])
    plain = [percent(np.mean([t.plain()[t.worst].mean() for t in some])) for some in found.values()]
    oracle = [
        marked(
            estimate(
                np.mean(
                    [np.asarray(t.oracle()[t.worst] - t.plain()[t.worst]) for t in some], axis=0
                )
            )
        )
        for some in found.values()
    ]
    lines += [["*oracle, told the recorded groups*", *oracle], ["*plain, %*", *plain]]
    return markdown(head, lines)


def settings_table(folder: Path, found: Sequence[Target], settings: Sequence[str]) -> str:
    """Headroom recovered by one setting, the same for all targets."""
    head = ["setting", *(title(t) for t in found), "mean", "accuracy, points", "score"]
    lines = []
    for setting in settings:
        rows = [with_setting(t, setting) for t in found]
        score = np.mean([r["score without groups"].mean() for r in rows])
        lines.append(
            [
                setting,
                *(share(t.recovered(r).mean) for t, r in zip(found, rows, strict=True)),
                spread(mean_recovered(found, rows)),
                points(mean_accuracy_change(found, rows).mean),
                f"{score:.3f}",
            ]
        )
    return markdown(head, lines)


# Cells ----------------------------------------------------------------------------------------


def share(value: float) -> str:
    """
    >>> share(0.734), share(-0.049), share(1.2)
    ('.73', '−.05', '1.20')
    """
    return f"{value:.2f}".replace("0.", ".", 1 if abs(value) < 0.995 else 0).replace("-", "−")


def spread(found: Estimate) -> str:
    return f"**{share(found.mean)}** ± {share(found.half)}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def marked(found: Estimate) -> str:
    """Points with half the interval; bold where the interval excludes 0."""
    text = f"{points(found.mean)} ± {percent(found.half)}"
    return f"**{text}**" if found.verdict != "no clear difference" else text


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))
