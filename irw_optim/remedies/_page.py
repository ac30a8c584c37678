"""The comparison as a figure, and as a page that needs nothing from anywhere else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from irw_optim.monitor.figures import STYLE, ShownFigure
from irw_optim.remedies._comparison import Difference, as_text
from irw_optim.remedies._measuring import Metric
from irw_optim.remedies._training import ORACLE, PLAIN

if TYPE_CHECKING:
    import pandas as pd

    from irw_optim.remedies._comparison import Comparison

# Of Okabe and Ito's colours; the markers say the same.
LOOKS = {1: ("#0072B2", "^", "▲"), -1: ("#D55E00", "v", "▼"), 0: ("#777777", "o", "")}


def looks(found: Difference, metric: Metric) -> tuple[str, str, str]:
    """Colour, marker and sign of what is clearly better than plain, clearly worse, or neither."""
    return LOOKS[int(found.clear) * metric.sign * (1 if found.mean > 0 else -1)]


def cells(result: Comparison) -> pd.DataFrame:
    """The table as text: ▲ and ▼ stand for clearly better and worse than plain."""
    table = result.table.astype(object)
    for metric in result.metrics:
        for name, value in result.table[metric.name].items():
            mark = looks(result.difference(str(name), metric.name), metric)[2] or " "
            number = f"{100 * value:.1f}" if metric.percent else f"{value:.2f}"
            table.loc[name, metric.name] = f"{'' if np.isnan(value) else number} {mark}"
    return table.rename_axis(None)


def draw(result: Comparison) -> Figure:
    """Differences to plain training, in points, with their intervals over the seeds."""
    shown, names = _shown(result)
    with rc_context(STYLE):
        figure = ShownFigure(
            (2.6 * len(shown) + 1.6, 0.9 + 0.34 * len(names)), layout="constrained"
        )
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, shown, strict=True):
            _dots(axis, result, metric, names)
    return figure


def panels(result: Comparison) -> list[str]:
    """The same as an SVG for each metric, which takes the colour of the text around it."""
    found = []
    shown, names = _shown(result)
    bare = {"figure.facecolor": "none", "axes.facecolor": "none", "grid.color": "#8885"}
    bare = STYLE | bare | {"axes.titlesize": 8.5}
    with rc_context(bare):
        for metric in shown:
            figure = Figure((3.5, 0.9 + 0.25 * len(names)), layout="constrained")
            _dots(figure.subplots(), result, metric, names)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            said = f'<svg role="img" aria-label="{metric.name}, differences to plain"'
            text = file.getvalue().replace("<svg", said, 1).replace("#000000", "currentColor")
            found.append(text[text.index("<svg") :])
    return found


def _shown(result: Comparison) -> tuple[list[Metric], list[str]]:
    """The shares where more is better, and the rows."""
    shown = [m for m in result.metrics if m.percent and m.sign > 0]
    if ORACLE in result.predictions:  # the groups decide
        shown = [m for m in shown if m.name != "score"]
    return shown, [name for name in result.predictions if name != PLAIN]


def _dots(axis: Axes, result: Comparison, metric: Metric, names: list[str]) -> None:
    axis.axvline(0, color="black", linewidth=1)
    for row, name in enumerate(names):
        found = result.difference(name, metric.name)
        colour, marker, _ = looks(found, metric)
        low, high = np.nan_to_num([found.mean - found.low, found.high - found.mean])
        axis.errorbar(
            100 * found.mean,
            row,
            xerr=[[100 * low], [100 * high]],
            fmt=marker,
            color=colour,
            markerfacecolor="none" if name == ORACLE else colour,
        )
    plain = result.table.loc[PLAIN, metric.name]
    axis.set_title(f"{metric.name} (plain: {plain:.1%})")
    axis.set_xlabel("points against plain")
    axis.grid(axis="y", visible=False)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def page(result: Comparison, path: Any = None, *, whole: bool = True) -> str:
    """The sentences and the figure first; what is long can be opened.

    Written to ``path`` if one is given; without ``whole`` it is a part of a notebook.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.from_string(PAGE).render(
        result=result,
        whole=whole,
        panels=panels(result),
        table=_html(cells(result)),
        more=dict(_more(result)),
    )
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    return text


def _more(result: Comparison) -> Iterator[tuple[str, str]]:
    """What is long: titles and tables."""
    import pandas as pd

    judge, names = result.judge, [name for name in result.predictions if name != PLAIN]
    differences = {
        metric.name: [_difference(result, name, metric) for name in names]
        for metric in result.metrics
        if metric.sign
    }
    title = "Differences to plain training, with their intervals"
    yield title, _html(pd.DataFrame(differences, names))
    for kind, parts in judge.names.items():
        shares = {
            name: 100 * judge.accuracies(kind, predicted == judge.labels).mean(0)
            for name, predicted in result.predictions.items()
        }
        if kind == "cell":
            parts = [f"class {name}, cluster {', '.join(map(str, of))}" for name, of in parts]
        table = pd.DataFrame({"people": judge.sizes(kind), **shares}, parts)
        yield f"Accuracy of every {kind}", _html(table.rename_axis(columns=kind), 1)
    yield "Every run", _html(result.runs.drop(columns=["held"]).reset_index(), 3, index=False)


def _html(table: pd.DataFrame, digits: int = 0, index: bool = True) -> str:
    numbers = f"{{:.{digits}f}}".format
    text: str = table.to_html(border=0, na_rep="", float_format=numbers, index=index)
    return text


def _difference(result: Comparison, name: str, metric: Metric) -> str:
    """The difference to plain and its interval, and its mark."""
    found = result.difference(name, metric.name)
    if np.isnan(found.mean):
        return ""
    return f"{as_text(found, percent=metric.percent)} {looks(found, metric)[2]}"


PAGE = """{% if whole %}<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Remedies compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"></head><body>{% endif %}
<div class="irw-remedies">
<style>
.irw-remedies { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; }
.irw-remedies ol > li:first-child { font-weight: 600; }
.irw-remedies figure { margin: 1em 0; display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.irw-remedies figcaption { grid-column: 1 / -1; }
.irw-remedies svg { width: 100%; height: auto; max-width: 28rem; fill: currentColor; }
.irw-remedies div { overflow-x: auto; }
.irw-remedies table { border-collapse: collapse; }
.irw-remedies :is(th, td) { padding: .2em .6em; text-align: right; white-space: nowrap; }
.irw-remedies thead th { white-space: normal; vertical-align: bottom; }
.irw-remedies :is(th, td):first-child { text-align: left; position: sticky; left: 0;
  background: var(--jp-layout-color0, var(--vscode-editor-background, Canvas)); }
.irw-remedies tr { border-bottom: 1px solid #8885; }
.irw-remedies summary { cursor: pointer; padding: .2em 0; }
@media (max-width: 30rem) { .irw-remedies tbody :is(th, td):first-child { white-space: normal; } }
</style>
<h1>Which remedy, if any?</h1>
<ol>{% for sentence in result.sentences %}<li>{{ sentence }}</li>{% endfor %}</ol>
<figure>{% for panel in panels %}{{ panel | safe }}{% endfor %}<figcaption>Differences to plain
training, mean and 95 % t interval over the seeds, paired: ▲ better, ▼ worse, ● neither.
</figcaption></figure>
<div>{{ table | safe }}</div>
{% if result.signs %}<h2>Signs that a remedy hurts</h2><ul>
{% for name, said in result.signs.items() %}<li>{{ name }}: {{ said | join("; ") }}.</li>
{% endfor %}</ul>{% endif %}
<details><summary>What the columns are, and how it was made</summary><dl>
{% for m in result.metrics %}<dt>{{ m.name }}</dt><dd>{{ m.meaning }}{% if m.percent %}, in %
{% endif %}</dd>{% endfor %}{% for name, value in result.settings.items() %}<dt>{{ name }}</dt>
<dd>{{ value }}</dd>{% endfor %}</dl></details>
{% for title, table in more.items() %}<details><summary>{{ title }}</summary>
<div>{{ table | safe }}</div></details>
{% endfor %}
</div>{% if whole %}</body></html>{% endif %}
"""
