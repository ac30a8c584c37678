"""Writes what the documentation shows: tables, verdicts and figures, from the stored runs.

    python -m benchmarks.evidence report

`fragments` is the whole text; a test compares it with the files, so that no number can drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence import tables
from benchmarks.evidence.analysis import (
    ACCURACY,
    WITH,
    WITHOUT,
    Target,
    chosen,
    first_five,
    mean_recovered,
    noisy_targets,
    protected,
    targets,
)
from benchmarks.evidence.claims import claims
from benchmarks.evidence.facts import facts
from benchmarks.evidence.grid import PLAIN
from benchmarks.evidence.single import (
    about_leaving_out,
    about_one_setting,
    confirmed,
    noise_of_one_setting,
    search_table,
)
from benchmarks.evidence.sweep import NOISES, RESULTS
from benchmarks.evidence.tables import IRW, METHODS, marked, percent
from benchmarks.report import figure


def fragments(folder: Path = RESULTS) -> dict[str, str]:
    """Every generated text by the name of its file."""
    found, verdicts = targets(folder), claims(folder)
    five = first_five(found)
    texts = {
        "headroom.md": tables.headroom_table(folder),
        "protected.md": tables.protected_table(folder),
        "metrics.md": "".join(
            f"**{t.title}**, {len(t.plain())} seeds\n\n{tables.metrics_table(t)}\n"
            for t in protected(folder)
        ),
        "settings.md": tables.settings_table(five, tables.best_settings(five)),
        "confirmed.md": confirmed(found),
        "left_out.md": about_leaving_out(five),
        "one_setting.md": about_one_setting(five),
        "varied.md": tables.varied_table(folder),
        "claims.md": "".join(claim.markdown() for claim in verdicts),
        "summary.md": "| claim | verdict |\n| --- | --- |\n"
        + "".join(f"| {claim.says} | {claim.verdict} |\n" for claim in verdicts),
        "seeds.md": about_the_runs(found),
        **facts(folder),
    }
    if noisy_targets(folder, max(NOISES)):
        texts["noise.md"] = tables.noise_table(folder, NOISES)
        texts["noise_of_one_setting.md"] = noise_of_one_setting(folder, NOISES)
    search, slow = (folder.with_name(f"fairness_{kind}") for kind in ("search", "slow"))
    if search.exists():
        texts["search.md"] = search_table(search)
    if slow.exists():
        texts["slow.md"] = tables.headroom_table(slow)
        texts["slow_confirmed.md"] = confirmed(targets(slow))
        texts["slow_one_setting.md"] = about_one_setting(first_five(targets(slow)))
    return texts


def about_the_runs(found: list[Target]) -> str:
    """Which seeds, and how large the spread between them is."""
    said = "; ".join(
        f"{t.title}: {', '.join(map(str, sorted(t.plain().index.tolist())))}" for t in found
    )
    headroom = "; ".join(f"{t.title} {marked(t.headroom())}" for t in found)
    plain = "; ".join(f"{t.title} {percent(t.plain()[ACCURACY].mean())}" for t in found)
    return (
        f"Seeds. {said}.\n\nHeadroom, in points with 95 % t intervals: {headroom}.\n\n"
        f"Accuracy of plain training, in %: {plain}.\n"
    )


def draw_recovered(five: Sequence[Target]) -> None:
    """Headroom recovered by each method, chosen with and without groups; dots are targets."""
    methods = [m for m in METHODS if m != PLAIN][::-1]
    size = (7.5, 0.33 * len(methods) + 1.2)
    with figure("fairness_headroom.png", 1, 1, size) as ((axis,),):
        for offset, by, colour in ((0.16, WITH, "#1b6ca8"), (-0.16, WITHOUT, "#d1495b")):
            for row, method in enumerate(methods):
                rows = chosen(five, method, by)
                found = mean_recovered(five, rows)
                each = [t.recovered(r).mean for t, r in zip(five, rows, strict=True)]
                places = np.full(len(each), row + offset)
                axis.plot(np.clip(each, -1, 1.3), places, ".", ms=3, color=colour, alpha=0.5)
                label = f"chosen {by}" if not row else None
                mean = np.clip(found.mean, -1, 1.3)
                look = {"fmt": "o", "ms": 5, "color": colour, "label": label}
                axis.errorbar(mean, row + offset, xerr=found.half, **look)
        axis.set_yticks(range(len(methods)), methods)
        for place, style in ((0, "-"), (1, ":")):
            axis.axvline(place, color="black", lw=0.8, ls=style)
        axis.set_xlim(-1.05, 1.35)
        axis.set_xlabel(
            "headroom recovered: 0 plain training, 1 trained with group labels\n"
            "(mean of five targets with 95 % interval; small dots: the targets, cut off at −1)"
        )


def draw_trade_off(five: Sequence[Target]) -> None:
    """What the worst-off group gains against what everybody loses, a panel for each target."""
    looks = {
        "plain": ("s", "black"),
        "IRW, all forms": ("o", "#d1495b"),
        "other methods": ("s", "#8d99ae"),
        "oracle": ("*", "#1b6ca8"),
    }
    with figure("fairness_trade_off.png", 1, len(five), (11, 3)) as (axes,):
        for axis, t in zip(axes, five, strict=True):
            runs = [(m, t.chosen(m, WITHOUT)) for m in METHODS[::-1]]  # plain training on top
            for method, rows in [*runs, ("oracle", t.oracle())]:
                kind = "IRW, all forms" if method in IRW else "other methods"
                mark, colour = looks[method if method in looks else kind]
                x, y = 100 * rows[ACCURACY].mean(), 100 * rows[t.worst].mean()
                axis.plot(x, y, mark, ms=10 if mark == "*" else 5, color=colour)
            axis.set_title(t.title, fontsize=9)
            axis.set_xlabel("accuracy, %")
        axes[0].set_ylabel("worst group, %")
        for label, (mark, colour) in looks.items():
            axes[-1].plot([], [], mark, color=colour, label=label)


def main(given: Sequence[str]) -> None:
    for name, text in fragments().items():
        (RESULTS / name).write_text(text, encoding="utf-8")
        print(RESULTS / name)
    five = first_five(targets(RESULTS))
    draw_recovered(five)
    draw_trade_off(five)
