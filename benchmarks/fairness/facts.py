"""The measured sentences of the page for practitioners."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.fairness.analysis import (
    WITHOUT,
    Estimate,
    Target,
    estimate,
    mean_recovered,
    protected,
    targets,
)
from benchmarks.fairness.grid import MOVED, PLAIN
from benchmarks.fairness.tables import (
    IRW,
    METHODS,
    accuracy_change,
    first_five,
    marked,
    noisy_targets,
    percent,
    points,
    spread,
    title,
)

WORST_NOISE = 0.2


def facts(folder: Path) -> dict[str, str]:
    """Every text by the name of its file."""
    five, by_people = first_five(targets(folder)), protected(folder)
    texts = {
        "facts_headroom.md": headroom(by_people, targets(folder)),
        "facts_simple.md": simple(five),
        "facts_try.md": ranked(five),
        "facts_not.md": by_groups_of_people(by_people),
    }
    if noisy_targets(folder, WORST_NOISE):
        texts["facts_noise.md"] = under_noise(folder)
    return texts


def headroom(by_people: Sequence[Target], with_label: Sequence[Target]) -> str:
    """What an oracle gains, in points."""
    lines = []
    for kind, found in (("Groups of people", by_people), ("Other groups", with_label)):
        cells = "; ".join(f"{title(t)} {marked(t.headroom())}" for t in found)
        lines.append(f"- {kind}, oracle minus plain, in points: {cells}.")
    return bullets(lines)


def simple(five: Sequence[Target]) -> str:
    """What costs nothing beside IRW in all its forms, chosen without groups."""
    names = {
        "moved threshold": (MOVED,),
        "balanced classes": ("class-balanced",),
        "both, whichever validation prefers": (MOVED, "class-balanced"),
        "IRW, whichever form validation prefers": IRW,
    }
    return bullets(f"- {name}: {gain_and_cost(five, methods)}." for name, methods in names.items())


def ranked(five: Sequence[Target]) -> str:
    """The forms of IRW by what they recover."""
    found = {method: recovered(five, (method,)).mean for method in IRW}
    best = sorted(found, key=found.__getitem__, reverse=True)[:4]
    lines = [f"- {method}: {gain_and_cost(five, (method,))}." for method in best]
    return "Of the forms of IRW these recovered most:\n\n" + bullets(lines)


def gain_and_cost(five: Sequence[Target], methods: tuple[str, ...]) -> str:
    rows = [t.chosen(methods, WITHOUT) for t in five]
    cost = points(accuracy_change(five, rows).mean)
    return f"{spread(mean_recovered(five, rows))} of the headroom, {cost} points of accuracy"


def recovered(five: Sequence[Target], methods: tuple[str, ...]) -> Estimate:
    return mean_recovered(five, [t.chosen(methods, WITHOUT) for t in five])


def by_groups_of_people(found: Sequence[Target]) -> str:
    """The best and the worst method on groups of people."""
    changes = {}
    for method in METHODS:
        if method != PLAIN:
            rows = [t.chosen(method, WITHOUT) for t in found]
            changes[method] = estimate(
                np.mean([change(t, r) for t, r in zip(found, rows, strict=True)], axis=0)
            )
    best = max(changes, key=lambda m: changes[m].mean)
    clearly = sum(change.verdict == "higher" for change in changes.values())
    best_change, ours = marked(changes[best]), marked(changes["IRW"])
    text = (
        f"- **No better service of groups of people** where the oracle finds no headroom: over "
        f"{len(found)} data sets, {clearly} of {len(changes)} methods clearly raised the worst "
        f"group of people; the best on average, {best}, changed it by {best_change} points, IRW as "
        f"in the paper by {ours}."
    )
    return bullets([text])


def change(found: Target, rows: pd.DataFrame) -> np.ndarray:
    return np.asarray(rows[found.worst] - found.plain()[found.worst])


def under_noise(folder: Path) -> str:
    """What flips do to plain training, to what is simple and to IRW."""
    noisy = noisy_targets(folder, WORST_NOISE)
    names = [(t.task, t.grouping) for t in noisy]
    clean = [t for t in noisy_targets(folder, 0.0) if (t.task, t.grouping) in names]
    lines = []
    for method in METHODS:
        if not (noisy[0].runs["method"] == method).any():
            continue
        before, after = (
            [t.chosen(method, WITHOUT)[t.worst] for t in found] for found in (clean, noisy)
        )
        fall = estimate(
            np.mean([np.asarray(b - a) for a, b in zip(before, after, strict=True)], axis=0)
        )
        level = percent(float(np.mean([values.mean() for values in before])))
        lines.append(
            f"- {method}: worst group {level} % without flips, {marked(fall)} points with "
            f"{WORST_NOISE:.0%} flipped."
        )
    return bullets(lines)


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
