"""Remedies on data that nobody tuned on, beside the five targets that they were tuned on.

    python -m benchmarks.evidence unseen             # an hour of one core; stopped, it goes on
    python -m benchmarks.evidence unseen --again     # texts and figure of what is stored

All data sets have the same seeds, steps and settings; nothing is chosen here. What counts are
targets with more than three points of headroom on clean labels; "natural" leaves out the planted
shortcuts.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.data.tasks import TASKS, UNSEEN
from benchmarks.evidence import analysis, signs
from benchmarks.evidence.analysis import Target, marked, mean_change, mean_recovered, of, spread
from benchmarks.evidence.dots import BLUE, ORANGE, Row, draw_rows
from benchmarks.evidence.evaluation import with_signs
from benchmarks.evidence.grid import CENTRED, HALF, TRUSTED, class_by_class, early_losses, unseen
from benchmarks.evidence.sweep import sweep
from benchmarks.training import Recipe

RESULTS = report.RESULTS / "unseen"
SEEN = {name: TASKS[name] for name, _ in analysis.FIRST_FIVE}
CLEAN, FLIPS = 0.0, 0.1
LEAST_HEADROOM = 0.03
BALANCED, FIFTH = "class-balanced", class_by_class(0.5, 0.5, 0.2).name
LOSSES = early_losses(0.5, 0.2).name
TRUSTED_FIFTH, TRUSTED_LOSSES = (f"{setting}, {TRUSTED}" for setting in (FIFTH, LOSSES))
REMEDIES = {
    "threshold moved": "plain, moved threshold: 1",
    "balanced": BALANCED,
    "balanced, half the steps": HALF,
    "two stages, a fifth": FIFTH,
    "two stages, a tenth": class_by_class(0.5, 0.5, 0.1).name,
    "control (losses), a fifth": LOSSES,
    "control (losses), a tenth": early_losses(0.5, 0.1).name,
    "IRW, as in the paper": "IRW: α 0.3",
    "IRW, centred": CENTRED,
    "JTT": "JTT: early 0.2, times 5",
    "CVaR": "CVaR, warm-up: α 0.3, mix 0",
}
"""What the pages call them, and their settings."""
CHOICES = {"any of them": REMEDIES.values(), "balanced or two stages": (BALANCED, FIFTH)}

PICKS = {name: of(setting) for name, setting in REMEDIES.items()}


@cache
def seen(folder: Path, noise: float = CLEAN) -> list[Target]:
    return analysis.first_five(analysis.targets(folder, noise, SEEN))


def natural(folder: Path, noise: float = CLEAN) -> list[Target]:
    return [t for t in with_headroom(folder, noise) if not t.task.startswith("coloured")]


@cache
def with_headroom(folder: Path, noise: float = CLEAN) -> list[Target]:
    """The same targets whatever the noise."""
    clean = analysis.targets(folder, CLEAN, UNSEEN)
    large = {(t.task, t.grouping) for t in clean if t.headroom().mean > LEAST_HEADROOM}
    found = analysis.targets(folder, noise, UNSEEN)
    return [t for t in found if (t.task, t.grouping) in large]


# Texts ----------------------------------------------------------------------------------------


def fragments(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated text by the name of its file."""
    found = with_headroom(folder)
    return {
        "summary.md": summary(folder),
        "means.md": means(folder),
        "shares.md": shares(analysis.targets(folder, CLEAN, UNSEEN)),
        "paired.md": paired(natural(folder)),
        "where.md": where(found),
        "people.md": people(folder),
        "choice.md": signs.choice(found, REMEDIES),
        "signs.md": signs.hurts(found, FIFTH, BALANCED),
        "within_noise.md": signs.within_noise(found, REMEDIES),
        "smaller_s.md": smaller_s(folder),
        "trust.md": trust(folder),
    }


def worth(found: Sequence[Target], pick: analysis.Pick) -> str:
    """Share of the headroom; points of the worst group, and of accuracy."""
    group = analysis.points(mean_change(found, pick).mean)
    return f"{spread(mean_recovered(found, pick))}; {group}, {analysis.cost(found, pick)}"


def worths(picks: dict[str, analysis.Pick], sets: dict[str, list[Target]], corner: str = "") -> str:
    """What each remedy is worth on each set of targets."""
    return report.crossed(corner, picks, {name: partial(worth, own) for name, own in sets.items()})


def summary(folder: Path) -> str:
    """The table of the first page."""
    sets = {
        f"the {len(seen(folder))} targets of development": seen(folder),
        f"{len(natural(folder))} unseen targets": natural(folder),
        "unseen, a tenth of the labels wrong": natural(folder, FLIPS),
    }
    names = [name for name in REMEDIES if not name.endswith("tenth")][:6]
    corner = "share of the headroom; points of the worst group, of accuracy"
    return worths({name: PICKS[name] for name in names}, sets, corner)


def means(folder: Path) -> str:
    """All remedies on all sets of targets."""
    sets = {"development": seen(folder), "natural, unseen": natural(folder)}
    sets["with planted shortcuts"] = with_headroom(folder)
    sets["development, a tenth flipped"] = seen(folder, FLIPS)
    sets["natural, unseen, a tenth flipped"] = natural(folder, FLIPS)
    chosen = {f"*the score's choice: {n}*": signs.by_score(own) for n, own in CHOICES.items()}
    table = worths(PICKS | chosen, {f"{name} ({len(own)})": own for name, own in sets.items()})
    clean, flipped = (len(natural(folder, noise)[0].plain()) for noise in (CLEAN, FLIPS))
    return f"{table}\nSeeds: {clean} without flips, {flipped} with them.\n"


def shares(found: Sequence[Target]) -> str:
    """Share of the headroom on each target."""

    def recovered(pick: analysis.Pick, t: Target) -> str:
        return spread(t.recovered(pick(t))) if t.headroom().mean > LEAST_HEADROOM else ""

    columns = {"plain → oracle, %": analysis.room}
    columns |= {name: partial(recovered, pick) for name, pick in PICKS.items()}
    return report.crossed("", {t.title: t for t in found}, columns)


def paired(found: Sequence[Target]) -> str:
    """Two stages against the rest."""
    cells = "; ".join(
        f"{name} {spread(mean_recovered(found, of(FIFTH), less=of(setting)))}"
        for name, setting in REMEDIES.items()
        if setting != FIFTH
    )
    return f"Two stages (a fifth) minus another, paired by seed, {len(found)} targets: {cells}.\n"


def against_balancing(found: Target, remedy: str) -> analysis.Estimate:
    own, balanced = PICKS[remedy](found), PICKS["balanced"](found)
    return found.difference(own, balanced, found.worst)


def where(found: Sequence[Target]) -> str:
    """Which of them is ahead of class balancing in the worst group, target by target."""
    forms = ("two stages, a fifth", "two stages, a tenth", "control (losses), a fifth")
    forms += ("IRW, as in the paper", "IRW, centred")
    columns = {form: lambda t, form=form: marked(against_balancing(t, form)) for form in forms}
    return report.crossed("minus class balancing, points", {t.title: t for t in found}, columns)


def alone(folder: Path) -> list[Target]:
    """The groups of people alone, of data without a planted shortcut."""
    return [
        Target(t.task, UNSEEN[t.task].protected, t.runs)
        for t in analysis.targets(folder, CLEAN, UNSEEN)
        if t.grouping == UNSEEN[t.task].targets[0] and not t.task.startswith("coloured")
    ]


def people(folder: Path) -> str:
    """What the groups of people alone gain and lose."""
    found = alone(folder)
    changes = "; ".join(f"{n} {marked(mean_change(found, pick))}" for n, pick in PICKS.items())
    gains = [t.headroom().mean for t in found]
    return (
        f"Worst group of people alone (without the label), {len(found)} unseen data sets: training "
        f"with their groups balanced changes it by {analysis.points(min(gains))} to "
        f"{analysis.points(max(gains))} points. Against plain training, in points: {changes}.\n"
    )


def smaller_s(folder: Path) -> str:
    """α 0.2 in each class in place of 0.5, beside the control."""
    rows = {}
    for name, found in {"development": seen(folder), "natural, unseen": natural(folder)}.items():
        for said, early in (("a fifth", 0.2), ("a tenth", 0.1)):
            forms = *(class_by_class(a, 0.5, early) for a in (0.2, 0.5)), early_losses(0.5, early)
            rows[f"{name}, {said}"] = found, [of(form.name) for form in forms]
    columns = {
        said: lambda row, place=place: worth(row[0], row[1][place])
        for place, said in enumerate(("α .2", "α .5", "control (losses)"))
    }
    for place, said in ((1, "α .2 minus α .5"), (2, "α .2 minus control")):
        columns[said] = lambda row, place=place: spread(
            mean_recovered(row[0], row[1][0], less=row[1][place])
        )
    return report.crossed("", rows, columns)


def trust(folder: Path) -> str:
    """Weights times the probability of the label to a cross-fitted model."""
    picks = {name: PICKS[name] for name in ("balanced", "two stages, a fifth")}
    picks["two stages, × trust"] = of(TRUSTED_FIFTH)
    picks["control (losses), a fifth"] = of(LOSSES)
    picks["control (losses), × trust"] = of(TRUSTED_LOSSES)
    sets = {
        f"{kind}{said}": read(folder, noise)
        for kind, read in (("development", seen), ("natural, unseen", natural))
        for said, noise in (("", CLEAN), (", a tenth flipped", FLIPS))
    }
    return worths(picks, sets)


# Figure ---------------------------------------------------------------------------------------

LOOKS = {"developed on": BLUE, "unseen": ORANGE}


def draw(folder: Path = RESULTS) -> None:
    """Share of the headroom that each remedy recovers; small strokes are targets."""
    sets = dict(zip(LOOKS, (seen(folder), natural(folder)), strict=True))
    rows = [
        Row(name, {kind: mean_recovered(own, pick) for kind, own in sets.items()})
        for name, pick in PICKS.items()
    ]
    with report.figure("unseen.png", 1, 1, (4.3, 5.8), dpi=200) as ((axis,),):
        draw_rows(axis, rows, LOOKS, scale=1)
        for place, pick in enumerate(PICKS.values()):
            for beside, (kind, own) in zip((-0.18, 0.18), sets.items(), strict=True):
                each = np.clip([t.recovered(pick(t)).mean for t in own], -0.9, 1.4)
                look = {"color": LOOKS[kind].colour, "ms": 7, "alpha": 0.5}
                axis.plot(each, np.full(len(each), place + beside), "|", **look)
        axis.axvline(1, color="black", lw=0.8, ls=":", zorder=0)
        axis.set_xlim(-0.95, 1.45)
        said = ("share of the headroom recovered", "0: plain training, 1: told the groups")
        axis.set_xlabel("\n".join([*said, "(strokes: targets, cut off at −.9)"]))


def write(folder: Path = RESULTS) -> None:
    for name, text in fragments(folder).items():
        (folder / name).write_text(text, encoding="utf-8")
    draw(folder)


def main(given: Sequence[str]) -> None:
    several = {"nargs": "+"}
    chosen = report.options(
        __doc__,
        given,
        tasks={**several, "choices": UNSEEN | SEEN, "default": list(UNSEEN | SEEN)},
        seeds={**several, "type": int, "default": range(1000, 1010)},
        noise={**several, "type": float, "default": (CLEAN, FLIPS)},
        again="texts and figure of stored results",
    )
    tasks = [(UNSEEN | SEEN)[name] for name in chosen.tasks]
    for noise in () if chosen.again else chosen.noise:
        sweep(tasks, chosen.seeds, [noise], RESULTS, Recipe(), unseen, with_signs)
    write()
