"""Draws the stored results of this folder's benchmarks for the documentation.

python -m benchmarks.schemes.figures
"""

from __future__ import annotations

import json
import re
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.schemes.results import RESULTS, ROOT
from benchmarks.schemes.selection import better, runs_of

FIGURES = ROOT / "docs" / "figures"
DATA = {"adult": "UCI Adult", "law": "Law School"}
WAYS = ("resampling", "reweighting", "normalised")


def stored(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def keep(name: str) -> None:
    """The same drawing is the same file."""
    undated = {"Date": None} if name.endswith(".svg") else None
    plt.savefig(FIGURES / name, metadata=undated, dpi=110)
    plt.close()


def variance() -> None:
    table = stored("schemes_variance")["table"]
    names = list(dict.fromkeys(row["optimizer"] for row in table))
    _, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for axis, steps in zip(axes, (1, 10), strict=True):
        rows = [row for row in table if row["updates"] == steps]
        for i, way in enumerate(WAYS):
            heights, errors = zip(*(row[f"{way}: variance"] for row in rows), strict=True)
            places = [j + 0.27 * (i - 1) for j in range(len(rows))]
            axis.bar(places, heights, 0.25, yerr=errors, label=way)
        axis.set(yscale="log", ylim=(1e-3, 1), ylabel="variance / squared mean")
        axis.set_xticks(range(len(names)), names)
        axis.set_title("one update" if steps == 1 else f"{steps} updates in a row")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    keep("schemes_variance.svg")


def held() -> None:
    """Local against global, by how long the weights are held."""
    _, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained", sharey=True)
    for axis, (data, title) in zip(axes, DATA.items(), strict=True):
        rows = {row["setting"]: row for row in stored(f"schemes_choosing_schemes_{data}")["table"]}
        key = "worst label x sex"
        for setting, style in (("local", "-"), ("plain", ":")):
            axis.axhline(100 * rows[setting][key][0], color="black", ls=style, label=setting)
        ticks = set()
        for use, beside in (("reweighting", 1.0), ("resampling", 1.06)):
            points = [
                (beside * int(found[1]), *row[key])
                for setting, row in rows.items()
                if (found := re.fullmatch(rf"global, {use}, every (\d+) steps", setting))
            ]
            ticks |= {round(point[0] / beside) for point in points}
            _line(axis, points, use, marker="o")
        axis.set(xscale="log", xlabel="steps that the weights are held", title=title)
        axis.set_xticks(sorted(ticks), map(str, sorted(ticks)))
        axis.minorticks_off()
    axes[0].set_ylabel("worst label x sex accuracy, %")
    axes[1].legend()
    keep("schemes_held.svg")


def alpha() -> None:
    _, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout="constrained", sharey=True)
    for axis, (data, title) in zip(axes, DATA.items(), strict=True):
        table = stored(f"schemes_choosing_alpha_{data}")["table"]
        plain = table[0]
        for i, key in enumerate(("accuracy", "worst race x sex", "worst label x sex")):
            points = [(float(row["setting"].split()[-1]), *row[key]) for row in table[1:]]
            _line(axis, points, key, marker="o", color=f"C{i}")
            axis.axhline(100 * plain[key][0], color=f"C{i}", ls=":")
        error = 1 - plain["accuracy"][0]
        axis.axvline(error, color="gray", lw=0.8)
        inside = axis.get_xaxis_transform()
        axis.text(error, 0.03, " error rate", color="gray", fontsize=8, transform=inside)
        axis.set(xscale="log", xlabel="α", title=f"{title} (dotted: plain training)")
        ticks = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
    axes[0].set_ylabel("%")
    axes[0].legend(fontsize=8, loc="lower left")
    keep("choosing_alpha.svg")


def _line(axis: Axes, points: list[tuple[float, float, float]], label: str, **style: Any) -> None:
    """Mean and standard deviation, in percent."""
    x, means, spreads = zip(*sorted(points), strict=True)
    percent = [[100 * value for value in values] for values in (means, spreads)]
    axis.errorbar(x, percent[0], percent[1], label=label, capsize=2, **style)


def selection() -> None:
    criteria = ("label x cluster", "accuracy", "tail loss")
    _, axes = plt.subplots(2, 3, figsize=(8.5, 5), layout="constrained")
    for row, (data, title) in zip(axes, DATA.items(), strict=True):
        runs, key = runs_of(data), "worst label x sex"
        correlations = next(
            line
            for line in stored("schemes_selection")["table"]
            if line["data"] == data and f"worst {line['true']}" == key
        )
        for axis, seen in zip(row, criteria, strict=True):
            shown = [abs(better(run, seen)) * (1 if "loss" in seen else 100) for run in runs]
            axis.scatter(shown, [100 * run[key] for run in runs], s=7, alpha=0.5)
            unit = "" if "loss" in seen else ", %"
            axis.set_xlabel(f"{seen}{unit} (held-out half)")
            if "loss" in seen:
                axis.set_xscale("log")
            axis.set_title(f"rank correlation {correlations[f'by {seen}']:.2f}", fontsize=9)
        row[0].set_ylabel(f"{title}: worst\nlabel x sex accuracy, %")
    keep("schemes_selection.png")  # hundreds of points


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "irw-optim", "font.size": 9})
    for draw in (variance, held, alpha, selection):
        draw()


if __name__ == "__main__":
    main()
