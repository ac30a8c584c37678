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

from benchmarks.fairness.analysis import (
    WITH,
    WITHOUT,
    Estimate,
    Target,
    estimate,
    mean_recovered,
    one_setting,
    read,
    recovered_by_seed,
    targets,
    with_setting,
)
from benchmarks.fairness.grid import CLASS_BY_CLASS, EARLY_LOSSES, FIXED, ON_CLEAN
from benchmarks.fairness.tables import (
    FIRST_FIVE,
    IRW,
    OTHERS,
    accuracy_change,
    first_five,
    markdown,
    marked,
    mean_change,
    noisy_targets,
    points,
    settings_table,
    share,
    spread,
    title,
)

AIM = 0.8
SAME_BY_LOSS = f"{EARLY_LOSSES}: mix 0.50, early 0.1"
CONTROL = f"{EARLY_LOSSES}: mix 0.50, early 0.2"
BESIDE = (
    ON_CLEAN,
    SAME_BY_LOSS,
    CONTROL,
    "JTT, class-balanced: early 0.2, times 5",
    "class-balanced",
)
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
    found = scores(folder)
    five = first_five(targets(folder))
    order = found.mean(axis=1).sort_values(ascending=False).index
    head = ["setting", *(f"score, {noise:.0%} flipped" for noise in found), "mean score"]
    head += [*map(title, five), "mean of the five", "accuracy, points"]
    lines = []
    for setting in order:
        rows = [with_setting(t, setting) for t in five]
        each = [t.recovered(r).mean for t, r in zip(five, rows, strict=True)]
        lines.append(
            [
                f"**{setting}**" if setting == FIXED else setting,
                *(f"{score:.3f}" for score in found.loc[setting]),
                f"{found.loc[setting].mean():.3f}",
                *map(share, each),
                share(float(np.mean(each))),
                points(accuracy_change(five, rows).mean),
            ]
        )
    return markdown(head, lines)


# The other seeds ------------------------------------------------------------------------------


def confirmed(found: Sequence[Target]) -> str:
    """The settings that were fixed beforehand, on the seeds that are reported."""
    five = first_five(found)
    ours = recovered_by_seed(five, [with_setting(t, FIXED) for t in five])
    beside = "; ".join(
        f"`{name}` "
        + spread(estimate(ours - recovered_by_seed(five, [with_setting(t, name) for t in five])))
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
    rows = [with_setting(t, setting) for t in five]
    recovered = mean_recovered(five, rows)
    others = "; ".join(
        f"{title(t)} {spread(t.recovered(with_setting(t, setting)))}"
        for t in found
        if t not in five
    )
    elsewhere = f" On targets that are not among the five: {others}." if others else ""
    return (
        f"`{setting}` recovers **{spread(recovered)}** of the headroom on average, at "
        f"{points(accuracy_change(five, rows).mean)} points of accuracy; it "
        f"{reaches(recovered.mean)} the aim of {share(AIM)}{certainty(recovered)}.{elsewhere}"
    )


def reaches(recovered: float) -> str:
    return "reaches" if recovered >= AIM else "misses"


def certainty(found: Estimate) -> str:
    """Says so where the interval holds the aim."""
    return ", though its interval holds it" if found.low < AIM < found.high else ""


def leave_one_out(five: Sequence[Target], methods: tuple[str, ...]) -> list[tuple[Target, str]]:
    """For each target the setting that recovers most on average on the other data sets."""
    settings = five[0].runs.loc[five[0].runs["method"].isin(methods), "setting"].unique()
    worth = {
        (t.task, t.grouping): {s: t.recovered(with_setting(t, s)).mean for s in settings}
        for t in five
    }
    chosen = []
    for target in five:
        elsewhere = [worth[t.task, t.grouping] for t in five if t.task != target.task]
        mean = {s: float(np.mean([found[s] for found in elsewhere])) for s in settings}
        chosen.append((target, max(mean, key=lambda s: mean[s])))
    return chosen


def about_leaving_out(five: Sequence[Target]) -> str:
    """The choice among all settings, each data set by what was best on the others."""
    lines = []
    for whose, methods in (("IRW, all forms", IRW), ("the other methods", OTHERS)):
        chosen = leave_one_out(five, methods)
        rows = [with_setting(t, setting) for t, setting in chosen]
        found = mean_recovered(five, rows)
        cost = points(accuracy_change(five, rows).mean)
        names = ", ".join(f"`{s}`" for s in dict.fromkeys(setting for _, setting in chosen))
        lines.append(
            f"- Of {whose}: {spread(found)} of the headroom, at {cost} points of accuracy; it "
            f"chose {names}."
        )
    return "\n".join(lines) + "\n"


def about_one_setting(five: list[Target]) -> str:
    """The single setting that the score without groups prefers, and whether it reaches the aim."""
    lines = []
    for whose, methods in (("IRW", IRW), ("the other methods", OTHERS)):
        setting = one_setting(five, methods)
        rows = [with_setting(t, setting) for t in five]
        recovered = mean_recovered(five, rows)
        lines.append(
            f"- Of {whose}: `{setting}` recovers {spread(recovered)} of the headroom, at "
            f"{points(accuracy_change(five, rows).mean)} points of accuracy; it "
            f"{reaches(recovered.mean)} the aim of {share(AIM)}."
        )
    for whose, methods in (("any of IRW", IRW), ("any of the others", OTHERS)):
        chosen = {by: [t.chosen(methods, by) for t in five] for by in (WITH, WITHOUT)}
        numbers = ", ".join(f"{by} {spread(mean_recovered(five, r))}" for by, r in chosen.items())
        lines.append(f"- Chosen anew for each data set and seed, {whose}: {numbers}.")
    return "\n".join(lines) + "\n"


def noise_of_one_setting(folder: Path, noises: Sequence[float]) -> str:
    """Worst group and accuracy against plain training with the same flips, in points."""
    lines = []
    for name in (FIXED, *BESIDE):
        cells = []
        for noise in noises:
            found = noisy_targets(folder, noise)
            found = [t for t in found if t.task in noisy_tasks(folder, max(noises))]
            rows = [with_setting(t, name) for t in found]
            cost = points(accuracy_change(found, rows).mean)
            cells.append(f"{marked(mean_change(found, rows))} (accuracy {cost})")
        lines.append([name, *cells])
    return markdown(["setting", *(f"{noise:.0%} flipped" for noise in noises)], lines)


def noisy_tasks(folder: Path, noise: float) -> set[str]:
    return {t.task for t in noisy_targets(folder, noise)}
