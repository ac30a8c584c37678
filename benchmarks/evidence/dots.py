"""Dot plots: means with their intervals, filled where the interval excludes 0."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.evidence.analysis import Estimate


class Look(NamedTuple):
    """Of one kind of dot, by colour (of Okabe and Ito's) and by shape."""

    colour: str
    marker: str


BLUE, ORANGE, GREEN = Look("#0072B2", "o"), Look("#D55E00", "s"), Look("#009E73", "^")
PURPLE = Look("#CC79A7", "D")


class Row(NamedTuple):
    """A line of a dot plot; without dots it is a heading."""

    name: str
    dots: Mapping[str, Estimate] = {}


def draw_rows(
    axis: Any,
    rows: Sequence[Row],
    looks: Mapping[str, Look],
    scale: float = 100,
    left: float | None = None,
) -> None:
    """From above to below; dots beyond ``left`` stand at it as arrows."""
    step = 1 / (len(looks) + 0.8)
    for place, row in enumerate(rows):
        if place:
            axis.axhline(place - 0.5, color="#e4e4e4", lw=0.6, zorder=0)
        for beside, (kind, found) in enumerate(row.dots.items()):
            offset = step * (beside - (len(row.dots) - 1) / 2)
            _dot(axis, found, place + offset, looks[kind], left, scale)
    axis.axvline(0, color="black", lw=0.8, zorder=0)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if row.dots else "bold")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    for kind, look in looks.items():
        axis.plot([], [], ls="", color=look.colour, marker=look.marker, label=kind)


def _dot(
    axis: Any, found: Estimate, y: float, look: Look, left: float | None, scale: float = 100
) -> None:
    mean, half = scale * found.mean, scale * found.half
    if left is not None and mean < left:
        axis.plot(left, y, "<", color=look.colour, ms=4.5)
        axis.annotate(f"{mean:.0f}".replace("-", "−"), (left, y), (5, 0), va="center", fontsize=7,
                      textcoords="offset points", color=look.colour)  # fmt: skip
        return
    clear = found.verdict != "no clear difference"
    axis.errorbar(mean, y, xerr=half, fmt=look.marker, ms=4.5, color=look.colour, elinewidth=1.2,
                  markerfacecolor=look.colour if clear else "white")  # fmt: skip
