"""What was found: the table, the differences to plain training, and what may be concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from irw_optim.remedies._measuring import GROUP, METRICS, Judge, Metric, Numbers
from irw_optim.remedies._methods import PLAIN
from irw_optim.remedies._people import group_names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ORACLE = "groups known (oracle)"
"""Plain training with its last layer fitted again, groups balanced: what there may be to gain."""

CONFIDENCE = 0.95
BY_HEART = 0.2
"""How much better a class is in training than in validation where it is learnt by heart."""


class Difference(NamedTuple):
    """A remedy minus plain training, seed by seed.

    Attributes:
        mean: over the seeds.
        low: of its t interval over the seeds; NaN for a single seed.
        high: of the same.
    """

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired(values: Numbers, others: Numbers, confidence: float = CONFIDENCE) -> Difference:
    """The mean of the paired differences and its t interval.

    >>> found = paired(np.array([0.5, 0.6, 0.7]), np.array([0.4, 0.4, 0.4]))
    >>> print(f"{found.mean:.3f}, {found.low:.3f} to {found.high:.3f}")
    0.200, -0.048 to 0.448
    """
    from scipy import stats

    differences = np.asarray(values, float) - np.asarray(others, float)
    mean, number = float(differences.mean()), len(differences)
    if number < 2:
        return Difference(mean, np.nan, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, number - 1) * differences.std(ddof=1) / number**0.5
    return Difference(mean, mean - float(half), mean + float(half))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_remedies` found; ``print`` shows it, a notebook too.

    Attributes:
        runs: a row for each remedy and seed, with every metric.
        predictions: {remedy: (seeds, N)} classes on the validation data.
        take: the remedy to take, ``"plain"`` where none is clearly better.
        sentences: the decision, its price, who is worst off, how sure it is, and what there is to
            gain or not to be seen.
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

    @classmethod
    def of(
        cls,
        rows: list[dict[str, Any]],
        predictions: Mapping[str, Numbers],
        judge: Judge,
        rare: int,
        blind: str | None,
        settings: Mapping[str, str],
    ) -> Comparison:
        """Draw the conclusions."""
        import pandas as pd

        from irw_optim.remedies._findings import conclude, signs_of_hurt

        runs = pd.DataFrame(rows).set_index(["remedy", "seed"])
        signs = signs_of_hurt(runs, rare)
        take, sentences = conclude(runs, predictions, judge, signs, blind)
        return cls(runs, predictions, take, sentences, signs, settings, judge)

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
        from fairlearn.metrics import MetricFrame, count
        from sklearn.metrics import accuracy_score

        names = group_names(groups, len(self.judge.labels))
        columns = {}
        for remedy, predicted in self.predictions.items():
            frames = [
                MetricFrame(
                    metrics={"accuracy": accuracy_score, "people": count},
                    y_true=self.judge.labels,
                    y_pred=one,
                    sensitive_features=names,
                ).by_group
                for one in predicted
            ]
            columns["people"] = frames[0]["people"].astype(int)
            columns[remedy] = sum(frame["accuracy"] for frame in frames) / len(frames)
        return pd.DataFrame(columns).rename_axis("group")

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
        sentences = "\n".join(fill(sentence, 98) for sentence in self.sentences)
        return f"{table.to_string()}\n{marks}\n\n{sentences}"


def worst_part(judge: Judge, kind: str, predicted: Numbers) -> tuple[Any, int, float]:
    """The part that fares worst on average over the seeds: name, people, accuracy."""
    found = judge.accuracies(kind, predicted == judge.labels).mean(0)
    worst = int(found.argmin())
    return judge.names[kind][worst], int(judge.sizes(kind)[worst]), float(found[worst])


def difference(runs: pd.DataFrame, remedy: str, metric: str, other: str = PLAIN) -> Difference:
    """Of one remedy to plain training, or to another."""
    return paired(runs.loc[remedy, metric].to_numpy(), runs.loc[other, metric].to_numpy())
