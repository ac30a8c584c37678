"""Remedies on data that nobody tuned on, beside the five targets that they were tuned on.

    python -m benchmarks.evidence unseen             # an hour of one core; stopped, it goes on
    python -m benchmarks.evidence unseen --again     # texts and figure of what is stored

All data sets have the same seeds, steps and settings; nothing is chosen here. What counts are
targets with more than three points of headroom on clean labels; "natural" leaves out the planted
shortcuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.data.tasks import TASKS, UNSEEN
from benchmarks.evidence.analysis import (
    FIRST_FIVE,
    Pick,
    Target,
    estimate,
    first_five,
    mean_change,
    mean_recovered,
    of,
    recovered_by_seed,
    targets,
)
from benchmarks.evidence.evaluation import with_signs
from benchmarks.evidence.grid import CENTRED, HALF, TRUSTED, class_by_class, early_losses, unseen
from benchmarks.evidence.signs import by_score, choice, hurts, within_noise
from benchmarks.evidence.sweep import sweep
from benchmarks.evidence.tables import cost, marked, percent, points, spread
from benchmarks.training import Recipe

RESULTS = report.RESULTS / "unseen"
SEEN = {name: TASKS[name] for name, _ in FIRST_FIVE}
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


@cache
def seen(folder: Path, noise: float = CLEAN) -> list[Target]:
    return first_five(targets(folder, noise, SEEN))


def natural(folder: Path, noise: float = CLEAN) -> list[Target]:
    return [t for t in with_headroom(folder, noise) if not t.task.startswith("coloured")]


@cache
def with_headroom(folder: Path, noise: float = CLEAN) -> list[Target]:
    """The same targets whatever the noise."""
    clean = targets(folder, CLEAN, UNSEEN)
    large = {(t.task, t.grouping) for t in clean if t.headroom().mean > LEAST_HEADROOM}
    return [t for t in targets(folder, noise, UNSEEN) if (t.task, t.grouping) in large]


# Texts ----------------------------------------------------------------------------------------


def fragments(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated text by the name of its file."""
    return {
        "summary.md": summary(folder),
        "means.md": means(folder),
        "shares.md": shares(targets(folder, CLEAN, UNSEEN)),
        "paired.md": paired(natural(folder)),
        "where.md": where(with_headroom(folder)),
        "people.md": people(folder),
        "choice.md": choice(with_headroom(folder), REMEDIES),
        "signs.md": hurts(with_headroom(folder), FIFTH, BALANCED),
        "within_noise.md": within_noise(with_headroom(folder), REMEDIES),
        "smaller_s.md": smaller_s(folder),
        "trust.md": trust(folder),
    }


def worth(found: Sequence[Target], pick: Pick) -> str:
    """Share of the headroom; points of the worst group, and of accuracy."""
    group = points(mean_change(found, pick).mean)
    return f"{spread(mean_recovered(found, pick))}; {group}, {cost(found, pick)}"


def summary(folder: Path) -> str:
    """The table of the first page."""
    sets = (seen(folder), natural(folder), natural(folder, FLIPS))
    names = [name for name in REMEDIES if not name.endswith("tenth")][:6]
    lines = [[name, *(worth(found, of(REMEDIES[name])) for found in sets)] for name in names]
    head = ["share of the headroom; points of the worst group, of accuracy"]
    head += [f"the {len(sets[0])} targets of development", f"{len(sets[1])} unseen targets"]
    return report.table([*head, "unseen, a tenth of the labels wrong"], lines)


def means(folder: Path) -> str:
    """All remedies on all sets of targets."""
    sets = {"development": seen(folder), "natural, unseen": natural(folder)}
    sets["with planted shortcuts"] = with_headroom(folder)
    sets["development, a tenth flipped"] = seen(folder, FLIPS)
    sets["natural, unseen, a tenth flipped"] = natural(folder, FLIPS)
    picks = {name: of(setting) for name, setting in REMEDIES.items()}
    picks |= {f"*the score's choice: {said}*": by_score(own) for said, own in CHOICES.items()}
    lines = [
        [name, *(worth(found, pick) for found in sets.values())] for name, pick in picks.items()
    ]
    table = report.table(["", *(f"{name} ({len(own)})" for name, own in sets.items())], lines)
    clean, flipped = (len(natural(folder, noise)[0].plain()) for noise in (CLEAN, FLIPS))
    return f"{table}\nSeeds: {clean} without flips, {flipped} with them.\n"


def shares(found: Sequence[Target]) -> str:
    """Share of the headroom on each target."""
    lines = []
    for t in found:
        ends = " → ".join(percent(runs[t.worst].mean()) for runs in (t.plain(), t.oracle()))
        small = not t.headroom().mean > LEAST_HEADROOM
        cells = ["" if small else spread(t.recovered(t.setting(s))) for s in REMEDIES.values()]
        lines.append([t.title, ends, *cells])
    return report.table(["", "plain → oracle, %", *REMEDIES], lines)


def paired(found: Sequence[Target]) -> str:
    """Two stages against the rest."""
    ours = recovered_by_seed(found, of(FIFTH))
    cells = "; ".join(
        f"{name} {spread(estimate(ours - recovered_by_seed(found, of(setting))))}"
        for name, setting in REMEDIES.items()
        if setting != FIFTH
    )
    return f"Two stages (a fifth) minus another, paired by seed, {len(found)} targets: {cells}.\n"


def where(found: Sequence[Target]) -> str:
    """Which of them is ahead of class balancing in the worst group, target by target."""
    forms = ("two stages, a fifth", "two stages, a tenth", "control (losses), a fifth")
    forms += ("IRW, as in the paper", "IRW, centred")
    lines = [
        [
            t.title,
            *(
                marked(t.difference(t.setting(s), t.setting(BALANCED), t.worst))
                for s in (REMEDIES[form] for form in forms)
            ),
        ]
        for t in found
    ]
    return report.table(["minus class balancing, points", *forms], lines)


def alone(folder: Path) -> list[Target]:
    """The groups of people alone, of data without a planted shortcut."""
    found = []
    for t in targets(folder, CLEAN, UNSEEN):
        task = UNSEEN[t.task]
        if t.grouping == task.targets[0] and not t.task.startswith("coloured"):
            found.append(Target(t.task, task.protected, t.runs))
    return found


def people(folder: Path) -> str:
    """What the groups of people alone gain and lose."""
    found = alone(folder)
    changes = "; ".join(
        f"{name} {marked(mean_change(found, of(setting)))}" for name, setting in REMEDIES.items()
    )
    oracle = " to ".join(points(f([t.headroom().mean for t in found])) for f in (min, max))
    return (
        f"Worst group of people alone (without the label), {len(found)} unseen data sets: "
        f"training with their groups balanced changes it by {oracle} points. "
        f"Against plain training, in points: {changes}.\n"
    )


def smaller_s(folder: Path) -> str:
    """α 0.2 in each class in place of 0.5, beside the control."""
    lines = []
    for name, found in {"development": seen(folder), "natural, unseen": natural(folder)}.items():
        for said, early in (("a fifth", 0.2), ("a tenth", 0.1)):
            names = (class_by_class(0.2, 0.5, early).name, class_by_class(0.5, 0.5, early).name)
            picks = [of(setting) for setting in (*names, early_losses(0.5, early).name)]
            terms = [recovered_by_seed(found, pick) for pick in picks]
            differences = [spread(estimate(terms[0] - other)) for other in terms[1:]]
            lines.append([f"{name}, {said}", *(worth(found, pick) for pick in picks), *differences])
    head = ["", "α .2", "α .5", "control (losses)", "α .2 minus α .5", "α .2 minus control"]
    return report.table(head, lines)


def trust(folder: Path) -> str:
    """Weights times the probability of the label to a cross-fitted model."""
    settings = {"balanced": BALANCED, "two stages, a fifth": FIFTH}
    settings |= {"two stages, × trust": TRUSTED_FIFTH}
    settings |= {"control (losses), a fifth": LOSSES, "control (losses), × trust": TRUSTED_LOSSES}
    sets = {
        f"{kind}{said}": read(folder, noise)
        for kind, read in (("development", seen), ("natural, unseen", natural))
        for said, noise in (("", CLEAN), (", a tenth flipped", FLIPS))
    }
    lines = [[n, *(worth(found, of(s)) for found in sets.values())] for n, s in settings.items()]
    return report.table(["", *sets], lines)


# Figure ---------------------------------------------------------------------------------------

LOOKS = {"developed on": ("#0072B2", "o"), "unseen": ("#D55E00", "s")}


def draw(folder: Path = RESULTS) -> None:
    """Share of the headroom that each remedy recovers; small strokes are targets."""
    names = list(REMEDIES)[::-1]
    with report.figure("unseen.png", 1, 1, (4.3, 5.8), dpi=200) as ((axis,),):
        found = zip(LOOKS.items(), (seen(folder), natural(folder)), (0.19, -0.19), strict=True)
        for (label, (colour, mark)), own, offset in found:
            for row, name in enumerate(names):
                pick = of(REMEDIES[name])
                mean = mean_recovered(own, pick)
                each = [t.recovered(pick(t)).mean for t in own]
                look = {"color": colour, "ls": ""}
                places = np.full(len(each), row + offset)
                axis.plot(np.clip(each, -0.9, 1.4), places, marker="|", ms=7, alpha=0.5, **look)
                look |= {"marker": mark, "ms": 4.5, "elinewidth": 1.5, "capsize": 3.5}
                said = label if not row else None
                axis.errorbar(mean.mean, row + offset, xerr=mean.half, label=said, **look)
        for place, style in ((0, "-"), (1, ":")):
            axis.axvline(place, color="black", lw=0.8, ls=style, zorder=0)
        for row in range(1, len(names)):
            axis.axhline(row - 0.5, color="#dddddd", lw=0.6, zorder=0)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlim=(-0.95, 1.45), ylim=(-0.6, len(names) - 0.4))
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
