"""What was found, as a table, sentences, a figure, and a page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._data import Numbers, group_names
from ._judging import Difference, Judge, as_text, difference, worst_part
from ._training import ORACLE, PLAIN

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Metric(NamedTuple):
    """A column; ``sign`` is 1 where more is better, -1 where less is."""

    name: str
    meaning: str
    sign: int = 1
    percent: bool = True


METRICS = (
    Metric("accuracy", "share of right predictions"),
    Metric("worst group", "accuracy of the worst group"),
    Metric("worst class", "accuracy of the worst class"),
    Metric("worst cell", "accuracy of the worst label × cluster cell"),
    Metric("score", "mean of worst class and worst cell: what to choose by without groups"),
    Metric("tail loss", "mean of the worst tenth of the log losses", -1, False),
    Metric("calibration error", "mean gap between confidence and accuracy, ten bins", -1),
    Metric("effective share", "effective sample size of the weights, share of N", 0),
    Metric("time", "seconds of training", 0, False),
)

LOOKS = {1: ("#0072B2", "^", "▲"), -1: ("#D55E00", "v", "▼"), 0: ("#777777", "o", "")}


def looks(found: Difference, metric: Metric) -> tuple[str, str, str]:
    return LOOKS[int(found.clear) * metric.sign * (1 if found.mean > 0 else -1)]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_remedies` found; ``print`` shows it, a notebook too.

    Attributes:
        runs: a row for each remedy and seed, with every metric.
        predictions: {remedy: (seeds, N)} classes on the validation data.
        take: the remedy to take, ``"plain"`` where none is clearly better.
        sentences: the decision, its price, who is worst off, how sure it is, and the headroom.
        signs: {remedy: how it is seen to hurt}.
        settings: how it was made.
    """

    runs: pd.DataFrame
    predictions: Mapping[str, Numbers]
    take: str
    sentences: Sequence[str]
    signs: Mapping[str, Sequence[str]]
    settings: Mapping[str, str]
    judge: Judge

    @property
    def metrics(self) -> list[Metric]:
        return [metric for metric in METRICS if metric.name in self.runs]

    @cached_property
    def table(self) -> pd.DataFrame:
        """Means over the seeds by remedy, and the people of the worst cell."""
        means = self.runs.groupby(level="remedy", sort=False).mean()[[m.name for m in self.metrics]]
        people = [worst_part(self.judge, "cell", self.predictions[n])[1] for n in means.index]
        means.insert(list(means).index("worst cell") + 1, "people in it", people)
        return means

    def difference(self, remedy: str, metric: str) -> Difference:
        """Of a remedy to plain training."""
        return difference(self.runs, remedy, metric)

    def to_pandas(self) -> pd.DataFrame:
        """By remedy and metric: mean, difference to plain, and its interval."""
        import pandas as pd

        metrics = [metric.name for metric in self.metrics]
        index = pd.MultiIndex.from_product([self.predictions, metrics], names=["remedy", "metric"])
        rows = [(self.table.loc[name, of], *self.difference(name, of)) for name, of in index]
        return pd.DataFrame(rows, index, ["mean", "difference", "low", "high"])

    def by_group(self, groups: Any) -> pd.DataFrame:
        """Accuracy of every group by remedy, mean over the seeds, and its people.

        Args:
            groups: any grouping of the validation data; columns are intersected.
        """
        import pandas as pd

        names = pd.Series(group_names(groups, self.judge.labels), name="group")
        right = {n: (p == self.judge.labels).mean(0) for n, p in self.predictions.items()}
        table = pd.DataFrame(right).groupby(names).mean()
        table.insert(0, "people", names.value_counts())
        return table

    def figure(self) -> Figure:
        """A panel a metric, a dot and its interval a remedy."""
        from matplotlib import rc_context

        from irw_optim.monitor.figures import STYLE, ShownFigure

        shown = self._shown
        size = 2.6 * len(shown) + 1.6, 0.56 + 0.34 * len(self.predictions)
        with rc_context(STYLE):
            figure = ShownFigure(size, layout="constrained")
            axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
            for axis, metric in zip(axes, shown, strict=True):
                self._dots(axis, metric)
        return figure

    def to_html(self, path: Any = None) -> str:
        """One page that needs nothing else, also written to ``path``."""
        text = self._page(whole=True)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return self._page(whole=False)

    def __str__(self) -> str:
        shown = [m.name for m in self._shown]
        shown.insert(shown.index("worst cell") + 1, "people in it")
        table = self._cells()[[*shown, "effective share"]].to_string()
        marks = "▲ better, ▼ worse than plain: the 95 % interval over the seeds excludes 0"
        said = [f"A sign against {name}: {'; '.join(of)}." for name, of in self.signs.items()]
        lines = [fill(one, 98, break_on_hyphens=False) for one in (*self.sentences, *said)]
        return f"{table}\n{marks}\n\n" + "\n".join(lines)

    def _cells(self) -> pd.DataFrame:
        table = self.table.astype(object)
        for metric in self.metrics:
            for name, value in self.table[metric.name].items():
                mark = looks(self.difference(str(name), metric.name), metric)[2] or " "
                number = f"{100 * value:.1f}" if metric.percent else f"{value:.2f}"
                table.loc[name, metric.name] = f"{'' if np.isnan(value) else number} {mark}"
        return table.rename_axis(None)

    @property
    def _shown(self) -> list[Metric]:
        """Shares where more is better; with groups, without the score."""
        out = "score" if ORACLE in self.predictions else ""
        return [m for m in self.metrics if m.percent and m.sign > 0 and m.name != out]

    @property
    def _names(self) -> list[str]:
        return [name for name in self.predictions if name != PLAIN]

    def _dots(self, axis: Axes, metric: Metric) -> None:
        names = self._names
        axis.axvline(0, color="black", linewidth=1)
        for row, name in enumerate(names):
            found = self.difference(name, metric.name)
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
        axis.set_title(f"{metric.name} (plain: {self.table.loc[PLAIN, metric.name]:.1%})")
        axis.set_xlabel("points against plain")
        axis.grid(axis="y", visible=False)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)

    def _panels(self) -> Iterator[str]:
        """SVGs in the colour of the text around them."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from irw_optim.monitor.figures import STYLE

        bare = {"figure.facecolor": "none", "axes.facecolor": "none", "grid.color": "#8885"}
        for metric in self._shown:
            with rc_context(STYLE | bare | {"axes.titlesize": 8.5}):
                figure = Figure((3.5, 0.65 + 0.25 * len(self.predictions)), layout="constrained")
                self._dots(figure.subplots(), metric)
                file = io.StringIO()
                figure.savefig(file, format="svg", metadata={"Date": None})
            said = f'<svg role="img" aria-label="{metric.name}, differences to plain"'
            text = file.getvalue().replace("<svg", said, 1).replace("#000000", "currentColor")
            yield text[text.index("<svg") :]

    def _page(self, whole: bool) -> str:
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        table, more = _html(self._cells()), list(self._more())
        return environment.from_string(PAGE).render(
            result=self, whole=whole, panels=self._panels(), table=table, more=more
        )

    def _more(self) -> Iterator[tuple[str, str]]:
        import pandas as pd

        def told(name: str, metric: Metric) -> str:
            found = self.difference(name, metric.name)
            return f"{as_text(found, '', metric.percent)} {looks(found, metric)[2]}"

        names = self._names
        differences = {m.name: [told(name, m) for name in names] for m in self.metrics if m.sign}
        title = "Differences to plain training, with their intervals"
        yield title, _html(pd.DataFrame(differences, names))
        for kind, parts in self.judge.names.items():
            shares = {
                name: 100 * self.judge.accuracies(kind, predicted == self.judge.labels).mean(0)
                for name, predicted in self.predictions.items()
            }
            if kind == "cell":
                parts = [f"class {name}, cluster {', '.join(map(str, of))}" for name, of in parts]
            table = pd.DataFrame({"people": self.judge.sizes(kind), **shares}, parts)
            yield f"Accuracy of every {kind}", _html(table.rename_axis(columns=kind), 1)
        yield "Every run", _html(self.runs.drop(columns=["held"]).reset_index(), 3, index=False)


def _html(table: pd.DataFrame, digits: int = 0, index: bool = True) -> str:
    numbers = f"{{:.{digits}f}}".format
    text: str = table.to_html(border=0, na_rep="", float_format=numbers, index=index)
    return text


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
{% for title, table in more %}<details><summary>{{ title }}</summary>
<div>{{ table | safe }}</div></details>
{% endfor %}
</div>{% if whole %}</body></html>{% endif %}
"""
