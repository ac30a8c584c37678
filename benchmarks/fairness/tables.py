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
    mean_recovered,
    protected,
    targets,
    with_setting,
)
from benchmarks.fairness.grid import PLAIN, without_groups

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
"""The targets of the headline mean: fixed before the runs."""

METHODS = tuple(dict.fromkeys(setting.method for setting in without_groups()))
IRW = tuple(method for method in METHODS if method.startswith("IRW"))
OTHERS = tuple(method for method in METHODS if method not in (*IRW, PLAIN))
BEST_OF = {"*any of IRW*": IRW, "*any of the others*": OTHERS}


def title(found: Target) -> str:
    return f"{SHORT[found.task]} {found.grouping.replace(' x ', ' × ')}"


def first_five(found: Iterable[Target]) -> list[Target]:
    return [t for t in found if (t.task, t.grouping) in FIRST_FIVE]


def accuracy_change(found: Sequence[Target], rows: Sequence[pd.DataFrame]) -> Estimate:
    """In accuracy, against plain training, mean over the targets."""
    changes = [
        np.asarray(runs["test accuracy"] - one.plain()["test accuracy"])
        for one, runs in zip(found, rows, strict=True)
    ]
    return estimate(np.mean(changes, axis=0))


def headroom_table(folder: Path) -> str:
    """Headroom recovered, by settings chosen with / without groups on validation."""
    found = targets(folder)
    five = first_five(found)
    head = ["method", *map(title, found), "mean of the first five", "accuracy, points"]
    lines = []
    run = set.intersection(*(set(t.runs["method"]) for t in found))
    each = {method: (method,) for method in METHODS if method in run - {PLAIN}}
    for name, methods in {**each, **BEST_OF}.items():
        cells = [
            " / ".join(share(t.recovered(t.chosen(methods, by)).mean) for by in (WITH, WITHOUT))
            for t in found
        ]
        rows = {by: [t.chosen(methods, by) for t in five] for by in (WITH, WITHOUT)}
        means = " / ".join(spread(mean_recovered(five, chosen)) for chosen in rows.values())
        cost = " / ".join(points(accuracy_change(five, chosen).mean) for chosen in rows.values())
        lines.append([name, *cells, means, cost])
    room = [
        f"{percent(t.plain()[t.worst].mean())} → {percent(t.oracle()[t.worst].mean())}"
        for t in found
    ]
    cost = points(accuracy_change(five, [t.oracle() for t in five]).mean)
    lines.append(["*plain → oracle, %*", *room, "", cost])
    return markdown(head, lines)


def protected_table(folder: Path) -> str:
    """Worst group by people, chosen with / without groups: points from plain training."""
    found = protected(folder)
    lines = []
    for method in METHODS:
        if method == PLAIN:
            continue
        cells = []
        for t in found:
            chosen = (t.chosen(method, by) for by in (WITH, WITHOUT))
            changes = (t.difference(rows, t.plain(), t.worst) for rows in chosen)
            cells.append(" / ".join(marked(change) for change in changes))
        lines.append([method, *cells])
    lines.append(["*oracle*", *(marked(t.headroom()) for t in found)])
    plain = [t.plain()[t.worst] for t in found]
    lines.append(["*plain, %*", *(f"{percent(p.mean())} ± {percent(p.std())}" for p in plain)])
    return markdown(["method", *map(title, found)], lines)


METRICS = ("accuracy", "worst", "MAD", "TAD", "mean loss", "VAR", "tail loss")


def metrics_table(found: Target) -> str:
    """All metrics of one task, chosen without groups: mean ± standard deviation over the seeds."""
    head = ["method", *(m if m != "worst" else f"worst {found.grouping}" for m in METRICS)]
    chosen = {method: found.chosen(method, WITHOUT) for method in METHODS}
    lines = []
    for method, rows in {**chosen, "*oracle*": found.oracle()}.items():
        cells = []
        for metric in METRICS:
            column = found.worst if metric == "worst" else f"test {metric}"
            scale, digits = (1, 3) if "loss" in metric or metric == "VAR" else (100, 1)
            verdict = found.difference(rows, found.plain(), column).verdict
            arrow = {"higher": " ▲", "lower": " ▼"}.get(verdict, "")
            mean, sd = scale * rows[column].mean(), scale * rows[column].std()
            cells.append(f"{mean:.{digits}f} ± {sd:.{digits}f}{arrow}")
        lines.append([method, *cells])
    return markdown(head, lines)


def noisy_targets(folder: Path, noise: float) -> list[Target]:
    """Those of the first five that have runs with so many flipped labels."""
    return first_five(targets(folder, noise))


def noise_table(folder: Path, noises: Sequence[float]) -> str:
    """Worst-off group, chosen without groups: points from plain training with the same flips."""
    noisy = [(t.task, t.grouping) for t in noisy_targets(folder, max(noises))]
    found = {
        noise: [t for t in noisy_targets(folder, noise) if (t.task, t.grouping) in noisy]
        for noise in noises
    }
    present = [m for m in METHODS if (found[max(noises)][0].runs["method"] == m).any()]
    lines = [
        [method, *(marked(against_plain(some, method)) for some in found.values())]
        for method in present
        if method != PLAIN
    ]
    oracle = [marked(mean_change(some, [t.oracle() for t in some])) for some in found.values()]
    plain = [percent(np.mean([t.plain()[t.worst].mean() for t in some])) for some in found.values()]
    lines += [["*oracle, told the recorded groups*", *oracle], ["*plain, %*", *plain]]
    return markdown(["method", *(f"{noise:.0%} flipped" for noise in noises)], lines)


def mean_change(found: Sequence[Target], rows: Sequence[pd.DataFrame]) -> Estimate:
    """In the worst group's accuracy against plain training, mean over the targets."""
    changes = [
        np.asarray(runs[t.worst] - t.plain()[t.worst]) for t, runs in zip(found, rows, strict=True)
    ]
    return estimate(np.mean(changes, axis=0))


def against_plain(found: Sequence[Target], method: str) -> Estimate:
    return mean_change(found, [t.chosen(method, WITHOUT) for t in found])


def settings_table(found: Sequence[Target], settings: Sequence[str]) -> str:
    """Headroom recovered by a setting that is the same for all targets."""
    head = ["setting", *map(title, found), "mean", "accuracy, points", "score without groups"]
    lines = []
    for setting in settings:
        rows = [with_setting(t, setting) for t in found]
        score = np.mean([r["score without groups"].mean() for r in rows])
        lines.append(
            [
                setting,
                *(share(t.recovered(r).mean) for t, r in zip(found, rows, strict=True)),
                spread(mean_recovered(found, rows)),
                points(accuracy_change(found, rows).mean),
                f"{score:.3f}",
            ]
        )
    return markdown(head, lines)


# Cells ----------------------------------------------------------------------------------------


def share(value: float) -> str:
    """A share of 1 with two digits.

    >>> share(0.734), share(-0.049), share(1.2), share(-1.0), share(10.5)
    ('.73', '−.05', '1.20', '−1.00', '10.50')
    """
    text = f"{abs(value):.2f}"
    return ("−" if round(value, 2) < 0 else "") + text.removeprefix("0")


def spread(found: Estimate) -> str:
    return f"{share(found.mean)} ± {share(found.half)}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def marked(found: Estimate) -> str:
    """Points with half the interval; bold where the interval excludes 0."""
    text = f"{points(found.mean)} ± {percent(found.half)}"
    return text if found.verdict == "no clear difference" else f"**{text}**"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))
