"""The tables of the documentation, as Markdown, from the runs that are stored."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.evidence import analysis, grid
from benchmarks.evidence.analysis import WITH, WITHOUT, Target, cost, marked, percent, share, spread
from benchmarks.evidence.grid import CLASS_BY_CLASS, EARLY_LOSSES, FIXED, ON_CLEAN, PLAIN
from benchmarks.report import crossed

METHODS = tuple(dict.fromkeys(setting.method for setting in grid.without_groups()))
IRW = tuple(method for method in METHODS if method.startswith("IRW"))
OTHERS = tuple(method for method in METHODS if method not in (*IRW, PLAIN))


def for_each(found: Sequence[Target], cell: Callable[[Target, str], str]) -> dict:
    """A column for each target."""
    return {t.title: partial(cell, t) for t in found}


def headroom_table(folder: Path) -> str:
    """Headroom recovered, by settings chosen with / without groups on validation."""
    found = analysis.targets(folder)
    five = analysis.first_five(found)
    run = set.intersection(*(set(t.runs["method"]) for t in found)) - {PLAIN}
    rows = {method: method for method in METHODS if method in run}
    rows |= {"*any of IRW*": IRW, "*any of the others*": OTHERS}

    def both(text: Callable[[analysis.Pick], str], methods: str | tuple[str, ...]) -> str:
        return " / ".join(text(analysis.best(methods, by)) for by in (WITH, WITHOUT))

    def on_one(t: Target, methods: str | tuple[str, ...]) -> str:
        return both(lambda pick: share(t.recovered(pick(t)).mean), methods)

    columns = for_each(found, on_one) | {
        "mean of the first five": partial(both, lambda p: spread(analysis.mean_recovered(five, p))),
        "accuracy, points": partial(both, lambda pick: cost(five, pick)),
    }
    ends = ["*plain → oracle, %*", *map(analysis.room, found), "", cost(five, Target.oracle)]
    return crossed("method", rows, columns, ends)


def protected_table(folder: Path) -> str:
    """Worst group by people, chosen with / without groups: points from plain training."""
    found = analysis.protected(folder)

    def changes(t: Target, method: str) -> str:
        rows = (t.chosen(method, by) for by in (WITH, WITHOUT))
        return " / ".join(marked(t.difference(own, t.plain(), t.worst)) for own in rows)

    oracle = ["*oracle*", *(marked(t.headroom()) for t in found)]
    plain = [t.plain()[t.worst] for t in found]
    accuracy = ["*plain, %*", *(f"{percent(p.mean())} ± {percent(p.std())}" for p in plain)]
    rows = {method: method for method in METHODS if method != PLAIN}
    return crossed("method", rows, for_each(found, changes), oracle, accuracy)


def noise_table(folder: Path, noises: Sequence[float]) -> str:
    """Worst-off group, chosen without groups: points from plain training with the same flips."""
    found = with_most_flips(folder, noises)
    picks = {method: analysis.best(method) for method in with_flips(found)}
    picks["*oracle, told the recorded groups*"] = Target.oracle
    columns = {
        name: lambda pick, some=some: marked(analysis.mean_change(some, pick))
        for name, some in zip(flips(noises), found, strict=True)
    }
    plain = [percent(np.mean([t.plain()[t.worst].mean() for t in some])) for some in found]
    return crossed("method", picks, columns, ["*plain, %*", *plain])


def with_most_flips(folder: Path, noises: Sequence[float]) -> list[list[Target]]:
    """For each share of flips the targets that have runs at the last and largest one."""
    last = [(t.task, t.grouping) for t in analysis.noisy_targets(folder, noises[-1])]
    every = (analysis.noisy_targets(folder, noise) for noise in noises)
    return [[t for t in found if (t.task, t.grouping) in last] for found in every]


def with_flips(found: Sequence[Sequence[Target]]) -> list[str]:
    """The methods, plain training aside, that have runs with flipped labels."""
    return [m for m in METHODS if (found[-1][0].runs["method"] == m).any() and m != PLAIN]


def flips(noises: Sequence[float]) -> list[str]:
    return [f"{noise:.0%} flipped" for noise in noises]


# One setting, the same for all data sets ------------------------------------------------------
#
# It was searched on seeds of its own, by the score without groups alone, on clean labels and on
# flipped ones, since nobody knows how many labels are wrong. Nothing of the seeds that are reported
# took part. That two stages were looked at at all is a choice made with a view of these data sets:
# `unseen` says what it is worth on others.

SAME_BY_LOSS = f"{EARLY_LOSSES}: mix 0.50, early 0.1"
CONTROL = f"{EARLY_LOSSES}: mix 0.50, early 0.2"
BEST_OF_THE_REST = ("JTT, class-balanced: early 0.2, times 5", "class-balanced")
BESIDE = (ON_CLEAN, SAME_BY_LOSS, CONTROL, *BEST_OF_THE_REST)
"""What the setting is compared with: what clean labels would have chosen, the same with the loss in
place of the score, what the search would have chosen by the loss, and the best of the rest."""


def scores(folder: Path) -> pd.DataFrame:
    """The score without groups, mean over data sets and seeds: settings x shares of flips."""
    names = {task for task, _ in analysis.FIRST_FIVE if (folder / f"{task}.csv").exists()}
    runs = pd.concat({n: analysis.read(folder, n) for n in sorted(names)}, names=["task"])
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


def recovered_of(setting: str) -> Callable[[Target], float]:
    return lambda t: t.recovered(t.setting(setting)).mean


def search_table(folder: Path) -> str:
    """The searched settings, the best score first, with what they recover on the search's seeds."""
    found, five = scores(folder), analysis.first_five(analysis.targets(folder))
    order = found.mean(axis=1).sort_values(ascending=False).index
    columns = {
        f"score, {name}": lambda s, noise=noise: f"{found.loc[s, noise]:.3f}"
        for name, noise in zip(flips(list(found)), found, strict=True)
    }
    columns["mean score"] = lambda s: f"{found.loc[s].mean():.3f}"
    columns |= for_each(five, lambda t, s: share(recovered_of(s)(t)))
    columns["mean of the five"] = lambda s: share(float(np.mean([*map(recovered_of(s), five)])))
    columns["accuracy, points"] = lambda s: cost(five, analysis.of(s))
    rows = {f"**{setting}**" if setting == FIXED else setting: setting for setting in order}
    return crossed("setting", rows, columns)


def confirmed(found: Sequence[Target]) -> str:
    """The settings that were fixed beforehand, on the seeds that are reported."""
    five = analysis.first_five(found)
    columns = for_each(five, lambda t, s: share(recovered_of(s)(t)))
    columns["mean"] = lambda s: spread(analysis.mean_recovered(five, analysis.of(s)))
    columns["accuracy, points"] = lambda s: cost(five, analysis.of(s))
    score = "score without groups"
    columns[score] = lambda s: f"{np.mean([t.setting(s)[score].mean() for t in five]):.3f}"
    ours, rows = analysis.of(FIXED), {setting: setting for setting in (FIXED, *BESIDE)}
    beside = "; ".join(
        f"`{s}` {spread(analysis.mean_recovered(five, ours, less=analysis.of(s)))}" for s in BESIDE
    )
    said = f"The first of these minus another, paired by seed: {beside}.\n"
    return f"{crossed('setting', rows, columns)}\n{said}"
