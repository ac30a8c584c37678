"""The measured sentences of the page for practitioners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.analysis import (
    WITHOUT,
    Target,
    chosen,
    first_five,
    mean_change,
    mean_difference,
    mean_recovered,
    noisy_targets,
    protected,
    targets,
)
from benchmarks.evidence.grid import MOVED, PLAIN
from benchmarks.evidence.tables import (
    IRW,
    METHODS,
    cost,
    marked,
    percent,
    spread,
    with_most_flips,
)

WORST_NOISE = 0.2


def facts(folder: Path) -> dict[str, str]:
    """Every text by the name of its file."""
    five, people = first_five(targets(folder)), protected(folder)
    texts = {
        "facts_headroom.md": headroom(people, targets(folder)),
        "facts_simple.md": simple(five),
        "facts_try.md": ranked(five),
        "facts_not.md": by_groups_of_people(people),
    }
    if noisy_targets(folder, WORST_NOISE):
        texts["facts_noise.md"] = under_noise(folder)
    return texts


def headroom(people: Sequence[Target], with_label: Sequence[Target]) -> str:
    """What an oracle gains, in points."""
    text = ""
    for kind, found in (("Groups of people", people), ("Other groups", with_label)):
        cells = "; ".join(f"{t.title} {marked(t.headroom())}" for t in found)
        text += f"- {kind}, oracle minus plain, in points: {cells}.\n"
    return text


def simple(five: Sequence[Target]) -> str:
    """What costs nothing beside IRW in all its forms, chosen without groups."""
    names = {
        "moved threshold": (MOVED,),
        "balanced classes": ("class-balanced",),
        "both, whichever validation prefers": (MOVED, "class-balanced"),
        "IRW, whichever form validation prefers": IRW,
    }
    return "".join(f"- {name}: {gain(five, methods)}.\n" for name, methods in names.items())


def ranked(five: Sequence[Target]) -> str:
    """The forms of IRW by what they recover."""
    found = {m: mean_recovered(five, chosen(five, m, WITHOUT)).mean for m in IRW}
    best = sorted(found, key=found.__getitem__, reverse=True)[:4]
    lines = "".join(f"- {method}: {gain(five, (method,))}.\n" for method in best)
    return f"Of the forms of IRW these recovered most:\n\n{lines}"


def gain(five: Sequence[Target], methods: tuple[str, ...]) -> str:
    rows = chosen(five, methods, WITHOUT)
    recovered = spread(mean_recovered(five, rows))
    return f"{recovered} of the headroom, {cost(five, rows)} points of accuracy"


def by_groups_of_people(found: Sequence[Target]) -> str:
    """The best and the worst method on groups of people."""
    changes = {m: mean_change(found, chosen(found, m, WITHOUT)) for m in METHODS if m != PLAIN}
    best = max(changes, key=lambda m: changes[m].mean)
    clearly = sum(change.verdict == "higher" for change in changes.values())
    return (
        f"- **No better service of groups of people** where the oracle finds no headroom: over "
        f"{len(found)} data sets, {clearly} of {len(changes)} methods clearly raised the worst "
        f"group of people; the best on average, {best}, changed it by {marked(changes[best])} "
        f"points, IRW as in the paper by {marked(changes['IRW'])}.\n"
    )


def under_noise(folder: Path) -> str:
    """What flips do to plain training, to what is simple and to IRW."""
    clean, noisy = with_most_flips(folder, (0.0, WORST_NOISE))
    text = ""
    for method in METHODS:
        if (noisy[0].runs["method"] == method).any():
            before, after = (chosen(found, method, WITHOUT) for found in (clean, noisy))
            fall = mean_difference(noisy, after, before)
            levels = [rows[t.worst].mean() for t, rows in zip(clean, before, strict=True)]
            text += (
                f"- {method}: worst group {percent(float(np.mean(levels)))} % without flips, "
                f"{marked(fall)} points with {WORST_NOISE:.0%} flipped.\n"
            )
    return text
