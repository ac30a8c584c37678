"""A picture of how the cost is spread over the models."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report

TIME, MEMORY = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito, told apart by all


def stored(path: Path) -> list[dict[str, Any]]:
    """The models of the last full run that were measured."""
    models: list[dict[str, Any]] = json.loads(path.read_text())["models"]
    return [found for found in models if "time" in found]


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Sorted dots of time and memory, multiples of a plain step."""
    with report.figure(str(path), 1, 1, (4.8, 3.3), dpi=180) as ((axes,),):
        for what, color, marker in (("time", TIME, "o"), ("memory", MEMORY, "^")):
            values = sorted(f[what] for f in found if what in f)
            share = [100 * (i + 0.5) / len(values) for i in range(len(values))]
            axes.plot(share, values, marker, color=color, markersize=3, alpha=0.8,
                      label=f"{what}, median {median(values):.2f}")  # fmt: skip
        axes.axhline(1, color="0.4", linewidth=1)
        axes.annotate("a plain step", (100, 1), xytext=(0, -10), textcoords="offset points",
                      ha="right", color="0.3", fontsize=8)  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.85)
        ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50) if t <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_title(
            f"What a step costs on {len(values)} models,\nas a multiple of a plain step",
            fontsize=9.5,
            fontweight="bold",
        )
        axes.set(xlabel="share of the models, cheapest first, in %", xlim=(0, 100))
        axes.grid(axis="y", color="0.9")
