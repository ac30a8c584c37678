"""The figures of the documentation, from the stored runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.fairness.analysis import WITH, WITHOUT, mean_recovered, targets
from benchmarks.fairness.grid import PLAIN
from benchmarks.fairness.tables import IRW, METHODS, first_five, title

COLOURS = {WITH: "#1b6ca8", WITHOUT: "#d1495b"}


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw all of them; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        return [recovered(results, folder), trade_off(results, folder)]


def recovered(results: Path, folder: Path) -> Path:
    """Headroom recovered by each method, chosen with and without groups; dots are targets."""
    five = first_five(targets(results))
    methods = [m for m in METHODS if m != PLAIN]
    figure = Figure(figsize=(7.5, 0.33 * len(methods) + 1.2), layout="constrained")
    axes = figure.subplots()
    for offset, by in ((0.16, WITH), (-0.16, WITHOUT)):
        for row, method in enumerate(reversed(methods)):
            rows = [t.chosen(method, by) for t in five]
            found = mean_recovered(five, rows)
            each = [t.recovered(r).mean for t, r in zip(five, rows, strict=True)]
            axes.plot(
                np.clip(each, -1, 1.3),
                np.full(len(each), row + offset),
                ".",
                ms=3,
                color=COLOURS[by],
                alpha=0.5,
            )
            axes.errorbar(
                np.clip(found.mean, -1, 1.3),
                row + offset,
                xerr=found.half,
                fmt="o",
                ms=5,
                color=COLOURS[by],
                label=f"chosen {by}" if not row else None,
            )
    axes.set_yticks(range(len(methods)), list(reversed(methods)))
    axes.axvline(0, color="black", lw=0.8)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_xlim(-1.05, 1.35)
    axes.set_xlabel(
        "headroom recovered: 0 plain training, 1 trained with group labels\n"
        "(mean of five targets with 95 % interval; small dots: the targets, cut off at −1)"
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return saved(figure, folder / "fairness_headroom.png")


def trade_off(results: Path, folder: Path) -> Path:
    """What the worst-off group gains against what everybody loses, a panel for each target."""
    five = first_five(targets(results))
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(five))
    for axes, t in zip(panels, five, strict=True):
        for method in METHODS:
            rows = t.chosen(method, WITHOUT)
            ours = method in IRW
            axes.plot(
                100 * rows["test accuracy"].mean(),
                100 * rows[t.worst].mean(),
                "o" if ours else "s",
                ms=5,
                color="black" if method == PLAIN else "#d1495b" if ours else "#8d99ae",
                zorder=3 if method == PLAIN else 2,
            )
        oracle = t.oracle()
        axes.plot(
            100 * oracle["test accuracy"].mean(),
            100 * oracle[t.worst].mean(),
            "*",
            ms=10,
            color="#1b6ca8",
        )
        axes.set_title(title(t), fontsize=9)
        axes.set_xlabel("accuracy, %")
    panels[0].set_ylabel("worst group, %")
    for label, mark, colour in (
        ("plain", "s", "black"),
        ("IRW, all forms", "o", "#d1495b"),
        ("other methods", "s", "#8d99ae"),
        ("oracle", "*", "#1b6ca8"),
    ):
        panels[-1].plot([], [], mark, color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return saved(figure, folder / "fairness_trade_off.png")


def saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
