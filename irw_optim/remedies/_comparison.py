"""What was found: the table, the differences to plain training, and what may be concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import fill
from typing import TYPE_CHECKING, Any

from irw_optim.remedies._findings import Difference, difference, worst_part
from irw_optim.remedies._measuring import GROUP, METRICS, Judge, Metric, Numbers, group_names
from irw_optim.remedies._methods import ORACLE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_remedies` found; ``print`` shows it, a notebook too.

    Attributes:
        runs: a row for each remedy and seed, with every metric.
        predictions: {remedy: (seeds, N)} classes on the validation data.
        take: the remedy to take, ``"plain"`` where none is clearly better.
        sentences: five: the decision, its price, who is worst off, how sure it is, and what there
            is to gain, or not to be seen.
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
        """The columns, the worst group among them where groups are known."""
        known = GROUP.name in self.runs
        return [METRICS[0], *[GROUP] * known, *METRICS[1:]]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each remedy: means over the seeds, and how many people the worst cell has."""
        means = self.runs.groupby(level="remedy", sort=False).mean()[[m.name for m in self.metrics]]
        people = [worst_part(self.judge, "cell", self.predictions[n])[1] for n in means.index]
        means.insert(list(means).index("worst cell") + 1, "people in it", people)
        return means

    def difference(self, remedy: str, metric: str) -> Difference:
        """Of a remedy to plain training."""
        return difference(self.runs, remedy, metric)

    def to_pandas(self) -> pd.DataFrame:
        """A row for each remedy and metric: the mean, the difference to plain, its interval."""
        import pandas as pd

        rows = {
            (name, metric.name): (self.table.loc[name, metric.name], *found)
            for name in self.predictions
            for metric in self.metrics
            for found in [self.difference(name, metric.name)]
        }
        index = pd.MultiIndex.from_tuples(rows, names=["remedy", "metric"])
        return pd.DataFrame(rows.values(), index, ["mean", "difference", "low", "high"])

    def by_group(self, groups: Any) -> pd.DataFrame:
        """Accuracy of every group under every remedy, mean over the seeds, and its people.

        Args:
            groups: of the validation data, any grouping of it; columns are intersected.
        """
        import pandas as pd

        names = pd.Series(group_names(groups, len(self.judge.labels)), name="group")
        right = {n: (p == self.judge.labels).mean(0) for n, p in self.predictions.items()}
        table = pd.DataFrame(right).groupby(names).mean()
        table.insert(0, "people", names.value_counts())
        return table

    def figure(self) -> Figure:
        """A panel for each metric, a dot and its interval for each remedy."""
        from irw_optim.remedies._page import draw

        return draw(self)

    def to_html(self, path: Any = None) -> str:
        """One page that needs nothing from anywhere else; written to ``path`` if one is given."""
        from irw_optim.remedies._page import page

        return page(self, path)

    def _repr_html_(self) -> str:
        from irw_optim.remedies._page import page

        return page(self, whole=False)

    def __str__(self) -> str:
        from irw_optim.remedies._page import cells

        left_out = ["score"] if ORACLE in self.predictions else []  # the groups decide
        table = cells(self).drop(columns=["tail loss", "calibration error", "time", *left_out])
        marks = "▲ better, ▼ worse than plain: the 95 % interval over the seeds excludes 0"
        said = [f"A sign against {name}: {'; '.join(of)}." for name, of in self.signs.items()]
        lines = [fill(one, 98, break_on_hyphens=False) for one in (*self.sentences, *said)]
        return f"{table.to_string()}\n{marks}\n\n" + "\n".join(lines)
