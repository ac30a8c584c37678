"""One setting, the same for all data sets: how it was found, and what it is worth elsewhere.

It was searched on seeds of its own, by the score without groups alone, on clean labels and on
flipped ones, since nobody knows how many labels are wrong. Nothing of the seeds that are reported
took part. That two stages were looked at at all is a choice made with a view of these data sets:
`unseen` says what it is worth on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.evidence.analysis import (
    FIRST_FIVE,
    Target,
    estimate,
    first_five,
    of,
    read,
    recovered_by_seed,
    targets,
)
from benchmarks.evidence.grid import CLASS_BY_CLASS, EARLY_LOSSES, FIXED, ON_CLEAN
from benchmarks.evidence.tables import cost, flips, settings_table, share, spread, titles
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
        pick, own = of(setting), found.loc[setting]
        each = [t.recovered(pick(t)).mean for t in five]
        cells = [*(f"{score:.3f}" for score in own), f"{own.mean():.3f}"]
        cells += [*map(share, each), share(float(np.mean(each))), cost(five, pick)]
        lines.append([f"**{setting}**" if setting == FIXED else setting, *cells])
    head = ["setting", *(f"score, {name}" for name in flips(list(found))), "mean score"]
    return table([*head, *titles(five), "mean of the five", "accuracy, points"], lines)


# The other seeds ------------------------------------------------------------------------------


def confirmed(found: Sequence[Target]) -> str:
    """The settings that were fixed beforehand, on the seeds that are reported."""
    five = first_five(found)
    ours = recovered_by_seed(five, of(FIXED))
    beside = "; ".join(
        f"`{name}` {spread(estimate(ours - recovered_by_seed(five, of(name))))}" for name in BESIDE
    )
    return (
        f"{settings_table(five, (FIXED, *BESIDE))}\n"
        f"The first of these minus another, paired by seed: {beside}.\n"
    )
