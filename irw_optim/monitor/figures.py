"""The course of a training as one figure: a panel for each question about it."""

from collections.abc import Callable, Hashable, Sequence
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .rows import Array, Row, column, parts_of

# Okabe and Ito's, for readers with any colour vision; as many of the largest parts have a line.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
}

Draw: TypeAlias = Callable[[Axes, Sequence[Row]], None]


class ShownFigure(Figure):
    """A notebook shows it without pyplot."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def draw(rows: Sequence[Row]) -> Figure:
    if not rows:
        raise RuntimeError("nothing was recorded yet: expected a call after optimizer.step()")
    panels = [(title, panel) for title, answers, panel in PANELS if answers(rows)]
    lines = -(-len(panels) // 2)
    with rc_context(STYLE):
        figure = ShownFigure((11, 2.4 * lines), layout="constrained")
        axes = figure.subplots(lines, 2, sharex=True, squeeze=False).flatten()
        plain = [row.step for row in rows if not row.numbers["weighted"]]
        for axis, (title, panel) in zip(axes, panels, strict=False):
            panel(axis, rows)
            if plain:
                axis.axvspan(plain[0], plain[-1], color="#eeeeee", zorder=0, label="warm-up")
            axis.set_title(title)
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[max(0, len(panels) - 2) : len(panels)]:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("optimizer step")
    return figure


def _losses(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "loss_q99", "99 % quantile", "#999999", show_each=True)
    _line(axis, rows, "worst_alpha_loss", "worst α-fraction, mean", "#D55E00", show_each=True)
    _line(axis, rows, "mean_loss", "all, mean", "#0072B2", show_each=True)
    axis.set_ylim(bottom=0)


def _carriers(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "effective_share", "effective sample size", "#0072B2")
    _line(axis, rows, "zero_share", "weight 0", "#999999")
    _line(axis, rows, "worst_off_weight", "weight of the worst-off", "#D55E00")
    _line(axis, rows, "largest_weight", "weight of one sample, largest", "#009E73")
    _percent(axis)


def _weight_by(kind: str) -> Draw:
    def panel(axis: Axes, rows: Sequence[Row]) -> None:
        _by_part(axis, rows, kind, "weight", 0.0)
        parts = parts_of(rows, kind)
        for part, colour in _shown(rows, kind):
            axis.axhline(parts[part].samples, color=colour, linestyle=":", linewidth=1)
        axis.plot([], [], color="black", linestyle=":", linewidth=1, label="share of samples")
        _percent(axis)

    return panel


def _loss_by_group(axis: Axes, rows: Sequence[Row]) -> None:
    _by_part(axis, rows, "group", "loss")
    axis.set_ylim(bottom=0)


def _removed(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "removed_share", "everybody", "#000000")
    _by_part(axis, rows, "group" if _knows("group")(rows) else "class", "removed")
    _percent(axis)


def _gradient(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "gradient_norm", "norm of the step's gradient", "#0072B2", show_each=True)
    norms = column(rows, "gradient_norm")
    fallback = column(rows, "fallback") > 0
    if fallback.any():
        steps = _steps(rows)[fallback]
        axis.plot(steps, norms[fallback], "x", color="#D55E00", label="fallback to uniform weights")
    if (norms > 0).any():
        axis.set_yscale("log")


def _held(axis: Axes, rows: Sequence[Row]) -> None:
    _line(axis, rows, "held_agreement", "S has the larger loss", "#0072B2", show_each=True)
    axis.axhline(0.5, color="black", linestyle=":", linewidth=1, label="chance")
    _percent(axis)


def _knows(kind: str) -> Callable[[Sequence[Row]], bool]:
    return lambda rows: any(kind in row.breakdowns for row in rows)


PANELS: tuple[tuple[str, Callable[[Sequence[Row]], bool], Draw], ...] = (
    ("Losses of a batch", lambda _: True, _losses),
    ("Who carries a step", lambda _: True, _carriers),
    ("Share of the weight, by class", _knows("class"), _weight_by("class")),
    ("Share of the weight, by group", _knows("group"), _weight_by("group")),
    ("Mean loss, by group", _knows("group"), _loss_by_group),
    (
        "Removed by the outlier filter",
        lambda rows: bool(column(rows, "removed_share").any()),
        _removed,
    ),
    (
        "Do held weights still know the worst-off?",
        lambda rows: bool(np.isfinite(column(rows, "held_agreement")).any()),
        _held,
    ),
    ("Length of the gradient", lambda _: True, _gradient),
)


def _line(
    axis: Axes,
    rows: Sequence[Row],
    values: Array | str,
    label: str,
    colour: str,
    show_each: bool = False,
) -> None:
    values = column(rows, values) if isinstance(values, str) else values
    if show_each:
        axis.plot(_steps(rows), values, ".", color=colour, alpha=0.2, markersize=2)
    axis.plot(_steps(rows), _smooth(values), color=colour, label=label, linewidth=1.5)


def _steps(rows: Sequence[Row]) -> Array:
    return np.array([row.step for row in rows])


def _smooth(values: Array) -> Array:
    """The mean of the known values around each, over a fortieth of the course."""
    window = np.ones(2 * (len(values) // 80) + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known, window, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _by_part(axis: Axes, rows: Sequence[Row], kind: str, name: str, absent: float = np.nan) -> None:
    """A line for each part, with gaps where it is not known."""
    tables = [row.breakdowns.get(kind) for row in rows]
    for part, colour in _shown(rows, kind):
        values = [np.nan if t is None else t.column(name).get(part, absent) for t in tables]
        _line(axis, rows, np.array(values), f"{kind} {part}", colour)


def _shown(rows: Sequence[Row], kind: str) -> list[tuple[Hashable, str]]:
    parts = parts_of(rows, kind)
    largest = sorted(parts, key=lambda part: -parts[part].samples)[: len(COLOURS)]
    return list(zip(sorted(largest, key=str), COLOURS, strict=False))


def _percent(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(0, 1.05)
