"""A picture of how the cost is spread over the models."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

TIME, MEMORY = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito, told apart by all


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Sorted dots of time and memory, multiples of a plain step."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "zoo"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for what, color, marker in (("time", TIME, "o"), ("memory", MEMORY, "^")):
        values = sorted(f[what] for f in found if what in f)
        share = [100 * (i + 0.5) / len(values) for i in range(len(values))]
        axes.plot(share, values, marker, color=color, markersize=4, alpha=0.8,
                  label=f"{what}, median {median(values):.2f}")  # fmt: skip
    axes.axhline(1, color="0.4", linewidth=1)
    axes.annotate("a plain step", (100, 1), xytext=(0, 3), textcoords="offset points", ha="right",
                  color="0.3", fontsize=9)  # fmt: skip
    axes.set_yscale("log")
    ticks = [t for t in (1, 1.5, 2, 3, 5, 10, 20, 50) if t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel=f"share of the {len(values)} models, cheapest first, in %",
        ylabel="multiple of a plain step",
        xlim=(0, 100),
    )
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
