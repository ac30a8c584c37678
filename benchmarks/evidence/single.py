"""One setting, the same for all data sets: how it was found, and what it is worth elsewhere.

It was searched on seeds of its own, by the score without groups alone, on clean labels and on
flipped ones, since nobody knows how many labels are wrong. Nothing of the seeds that are reported
took part. That two stages were looked at at all is a choice made with a view of these data sets:
`leave_one_out` says what a choice of method and setting on the other data sets leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.evidence.analysis import (
    FIRST_FIVE,
    WITH,
    WITHOUT,
    Estimate,
    Target,
    chosen,
    estimate,
    first_five,
    mean_change,
    mean_recovered,
    of_setting,
    one_setting,
    read,
    recovered_by_seed,
    targets,
    with_setting,
)
from benchmarks.evidence.grid import CLASS_BY_CLASS, EARLY_LOSSES, FIXED, ON_CLEAN
from benchmarks.evidence.tables import (
    IRW,
    OTHERS,
    cost,
    flips,
    marked,
    settings_table,
    share,
    spread,
    titles,
    with_most_flips,
)
from benchmarks.report import table

AIM = 0.8
SAME_BY_LOSS = f"{EARLY_LOSSES}: mix 0.50, early 0.1"
CONTROL = f"{EARLY_LOSSES}: mix 0.50, early 0.2"
BEST_OF_THE_REST = ("JTT, class-balanced: early 0.2, times 5", "class-balanced")
BESIDE = (ON_CLEAN, SAME_BY_LOSS, CONTROL, *BEST_OF_THE_REST)
"""What the setting is compared with: what clean labels would have chosen, the same with the loss in
place of the score, what the search would have chosen by the loss, and the best of the rest."""


# The search -----------------------------------------------------------------------------------


def scores(folder: Path) -> pd.DataFrame:
    """The score without groups, mean over data sets and seeds: settings x shares of flips."""
    tasks = sorted({task for task, _ in FIRST_FIVE if (folder / f"{task}.csv").exists()})
    runs = pd.concat({task: read(folder, task) for task in tasks}, names=["task"])
    runs = runs[runs["method"].isin((CLASS_BY_CLASS, EARLY_LOSSES))]
    by_task = runs.groupby(["noise", "task", "setting"])["score without groups"].mean()
    return by_task.groupby(["noise", "setting"]).mean().unstack("noise")


def choice(
    folder: Path, method: str = CLASS_BY_CLASS, noises: Sequence[float] | None = None
) -> str:
    """The method's setting with the best mean score over the shares of flips, or over some."""
    found = scores(folder)
    found = (found if noises is None else found[list(noises)]).mean(axis=1)
    return str(found[found.index.str.startswith(f"{method}:")].idxmax())


def search_table(folder: Path) -> str:
    """The searched settings, the best score first, with what they recover on the search's seeds."""
    found, five = scores(folder), first_five(targets(folder))
    lines = []
    for setting in found.mean(axis=1).sort_values(ascending=False).index:
        rows, own = of_setting(five, setting), found.loc[setting]
        each = [t.recovered(r).mean for t, r in zip(five, rows, strict=True)]
        cells = [*(f"{score:.3f}" for score in own), f"{own.mean():.3f}"]
        cells += [*map(share, each), share(float(np.mean(each))), cost(five, rows)]
        lines.append([f"**{setting}**" if setting == FIXED else setting, *cells])
    head = ["setting", *(f"score, {name}" for name in flips(list(found))), "mean score"]
    return table([*head, *titles(five), "mean of the five", "accuracy, points"], lines)


# The other seeds ------------------------------------------------------------------------------


def confirmed(found: Sequence[Target]) -> str:
    """The settings that were fixed beforehand, on the seeds that are reported."""
    five = first_five(found)
    ours = recovered_by_seed(five, of_setting(five, FIXED))
    beside = "; ".join(
        f"`{name}` {spread(estimate(ours - recovered_by_seed(five, of_setting(five, name))))}"
        for name in BESIDE
    )
    return (
        "".join(f"- {about(setting, found)}\n" for setting in (FIXED, ON_CLEAN))
        + f"\n{settings_table(five, (FIXED, *BESIDE))}\n"
        + f"The first of these minus another, paired by seed: {beside}.\n"
    )


def about(setting: str, found: Sequence[Target]) -> str:
    """What it recovers on the first five targets, and on the others."""
    five = first_five(found)
    rows = of_setting(five, setting)
    recovered = mean_recovered(five, rows)
    others = "; ".join(
        f"{t.title} {spread(t.recovered(with_setting(t, setting)))}" for t in found if t not in five
    )
    elsewhere = f" On targets that are not among the five: {others}." if others else ""
    return (
        f"`{setting}` recovers **{spread(recovered)}** of the headroom on average, at "
        f"{cost(five, rows)} points of accuracy; it {reaches(recovered.mean)} the aim of "
        f"{share(AIM)}{certainty(recovered)}.{elsewhere}"
    )


def reaches(recovered: float) -> str:
    return "reaches" if recovered >= AIM else "misses"


def certainty(found: Estimate) -> str:
    """Says so where the interval holds the aim."""
    return ", though its interval holds it" if found.low < AIM < found.high else ""


def leave_one_out(five: Sequence[Target], methods: tuple[str, ...]) -> list[tuple[Target, str]]:
    """For each target the setting that recovers most on average on the other data sets."""
    settings = five[0].runs.loc[five[0].runs["method"].isin(methods), "setting"].unique()
    worth = [{s: t.recovered(with_setting(t, s)).mean for s in settings} for t in five]
    best = []
    for target in five:
        elsewhere = [own for t, own in zip(five, worth, strict=True) if t.task != target.task]
        mean = {s: float(np.mean([own[s] for own in elsewhere])) for s in settings}
        best.append((target, max(mean, key=mean.__getitem__)))
    return best


def about_leaving_out(five: Sequence[Target]) -> str:
    """The choice among all settings, each data set by what was best on the others."""
    lines = []
    for whose, methods in (("IRW, all forms", IRW), ("the other methods", OTHERS)):
        best = leave_one_out(five, methods)
        rows = [with_setting(t, setting) for t, setting in best]
        names = ", ".join(f"`{s}`" for s in dict.fromkeys(setting for _, setting in best))
        lines.append(
            f"- Of {whose}: {spread(mean_recovered(five, rows))} of the headroom, at "
            f"{cost(five, rows)} points of accuracy; it chose {names}.\n"
        )
    return "".join(lines)


def about_one_setting(five: list[Target]) -> str:
    """The single setting that the score without groups prefers, and whether it reaches the aim."""
    lines = []
    for whose, methods in (("IRW", IRW), ("the other methods", OTHERS)):
        setting = one_setting(five, methods)
        rows = of_setting(five, setting)
        recovered = mean_recovered(five, rows)
        lines.append(
            f"- Of {whose}: `{setting}` recovers {spread(recovered)} of the headroom, at "
            f"{cost(five, rows)} points of accuracy; it {reaches(recovered.mean)} the aim of "
            f"{share(AIM)}.\n"
        )
    for whose, methods in (("any of IRW", IRW), ("any of the others", OTHERS)):
        found = {by: mean_recovered(five, chosen(five, methods, by)) for by in (WITH, WITHOUT)}
        numbers = ", ".join(f"{by} {spread(own)}" for by, own in found.items())
        lines.append(f"- Chosen anew for each data set and seed, {whose}: {numbers}.\n")
    return "".join(lines)


def noise_of_one_setting(folder: Path, noises: Sequence[float]) -> str:
    """Worst group and accuracy against plain training with the same flips, in points."""
    lines = []
    for name in (FIXED, *BESIDE):
        cells = [
            f"{marked(mean_change(found, rows))} (accuracy {cost(found, rows)})"
            for found in with_most_flips(folder, noises)
            for rows in [of_setting(found, name)]
        ]
        lines.append([name, *cells])
    return table(["setting", *flips(noises)], lines)
