"""The report's figures, as data URIs that a page can hold inside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from adult_report.evaluation import INCOME_SEX, PARTITIONS, RACE_SEX, group_sizes
from adult_report.runs import Runs, mean_and_sd

WIDTH = 5.0  # inches; a phone shows it at three quarters, and the text must stay legible

# Okabe and Ito's colours, for readers with any colour vision; the markers say it again.
LOOKS = [
    ("#000000", "o"),
    ("#999999", "o"),
    ("#0072B2", "s"),
    ("#CC79A7", "X"),
    ("#D55E00", "D"),
    ("#009E73", "^"),
    ("#E69F00", "v"),
]
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.hashsalt": "adult",  # the same run gives the same file
}


@dataclass(frozen=True)
class Picture:
    """A figure for the page.

    Attributes:
        title: what it shows.
        caption: how to read it.
        uri: the SVG, inside a data URI.
    """

    title: str
    caption: str
    uri: str


def pictures(runs: Runs) -> list[Picture]:
    """All figures of the report."""
    seeds = runs.counted_seeds
    return [
        Picture(
            f"Accuracy by group: {RACE_SEX}",
            f"Test split, mean and standard deviation over {seeds}; n people in the group. "
            "The largest group is at the top.",
            drawn(lambda: accuracy_by_group(runs, RACE_SEX)),
        ),
        Picture(
            f"Accuracy by group: {INCOME_SEX}",
            f"Test split, mean and standard deviation over {seeds}; n people in the group. "
            "These groups include the label.",
            drawn(lambda: accuracy_by_group(runs, INCOME_SEX)),
        ),
        Picture(
            "Who got the weight in training",
            "A group's share of the weight divided by its share of the samples, after any warm-up: "
            "1 is an equal say for everybody. No method was told the groups of race and sex.",
            drawn(lambda: weights_by_group(runs)),
        ),
        Picture(
            "Effective sample size",
            "1 / Σw², in per cent of the batch, averaged over each epoch: how many samples carry a "
            f"step. The bands are one standard deviation over {seeds}.",
            drawn(lambda: over_time(runs, "effective share", "of the batch", percent=True)),
        ),
        Picture(
            f"Mean of the worst {runs.alpha:.0%} of the test losses",
            "At the end of each epoch; the dotted line is ln 2, even odds for everybody. The bands "
            f"are one standard deviation over {seeds}.",
            drawn(lambda: over_time(runs, "tail loss", "cross entropy", reference=np.log(2))),
        ),
    ]


def drawn(draw: Callable[[], Figure]) -> str:
    """A figure in the report's style, as the data URI of an SVG."""
    file = io.BytesIO()
    with rc_context(STYLE):
        draw().savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def accuracy_by_group(runs: Runs, partition: str) -> Figure:
    """A row for each group, a mark for each method."""
    means, sds = mean_and_sd(runs.accuracy(partition))
    sizes = group_sizes(runs.test, partition)
    figure = Figure((WIDTH, 1.2 + 0.62 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    middle = np.arange(len(sizes))
    offsets = np.linspace(-0.33, 0.33, len(means))
    for (method, mean), offset in zip(means.iterrows(), offsets, strict=True):
        colour, marker = looks(runs, method)
        spread = sds.loc[method, sizes.index].fillna(0)
        axes.errorbar(
            100 * mean[sizes.index],
            middle + offset,
            xerr=100 * spread,
            fmt=marker,
            color=colour,
            markersize=4.5,
            elinewidth=1,
            label=method,
        )
    axes.hlines(middle[1:] - 0.5, 0, 1, transform=axes.get_yaxis_transform(), color="#e4e4e4")
    axes.grid(axis="y", visible=False)
    axes.set_yticks(middle, [f"{short(group)}\nn = {size:,}" for group, size in sizes.items()])
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_xlabel("accuracy")
    legend_above(figure, axes)
    return figure


def weights_by_group(runs: Runs) -> Figure:
    """A cell for each group and method, with the ratio written in it."""
    ratios = pd.concat([runs.weight_ratio(name) for name in PARTITIONS], axis=1)
    order = [g for name in reversed(PARTITIONS) for g in group_sizes(runs.train, name).index]
    table = mean_and_sd(ratios)[0][order].T
    shades = np.log2(table.to_numpy().clip(1 / 8, 8))
    figure = Figure((WIDTH, 0.9 + 0.3 * len(table)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shades, cmap="PuOr_r", norm=TwoSlopeNorm(0, -3, 3), aspect="auto")
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        dark = abs(shades[row, column]) > 2
        colour = "white" if dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=9)
    axes.grid(visible=False)
    axes.axhline(len(group_sizes(runs.train, INCOME_SEX)) - 0.5, color="black", linewidth=1)
    axes.set_yticks(range(len(table)), [short(group) for group in table.index])
    slanted = {"rotation": 40, "rotation_mode": "anchor", "ha": "left"}
    axes.set_xticks(range(len(table.columns)), table.columns, **slanted)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def over_time(
    runs: Runs, column: str, label: str, *, percent: bool = False, reference: float | None = None
) -> Figure:
    """A line for each method over the epochs."""
    scale = 100 if percent else 1
    means, sds = mean_and_sd(scale * runs.history(column))
    figure = Figure((WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, mean in means.iterrows():
        colour, marker = looks(runs, method)
        spread = sds.loc[method].fillna(0)
        axes.plot(mean.index, mean, marker, linestyle="-", color=colour, markersize=4, label=method)
        axes.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    if reference is not None:
        axes.axhline(reference, color="black", linestyle=":", linewidth=1)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_ylim(0, 105)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    legend_above(figure, axes)
    return figure


def legend_above(figure: Figure, axes: Axes) -> None:
    """All methods, outside the axes, where they hide nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def looks(runs: Runs, method: object) -> tuple[str, str]:
    """The colour and marker of a method, the same in every figure."""
    return LOOKS[runs.methods.index(str(method))]


def short(group: str) -> str:
    """A group's name without what a reader does not need."""
    return group.replace("Asian-Pac-Islander", "Asian-Pacific").replace(
        "Amer-Indian-Eskimo", "Native American"
    )
