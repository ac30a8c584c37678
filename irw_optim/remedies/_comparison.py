"""What was found: the table, the differences to plain training, and what may be concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from irw_optim.remedies._measuring import METRICS, Judge, Metric, Numbers, group_names
from irw_optim.remedies._training import BALANCED, ORACLE, PLAIN
from irw_optim.schemes.global_weights import FEW

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

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
        return [metric for metric in METRICS if metric.name in self.runs]

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

        names = pd.Series(group_names(groups, self.judge.labels), name="group")
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


def paired(runs: pd.DataFrame, remedy: str, other: str, metric: str) -> Numbers:
    """One remedy minus another, (seeds,)."""
    found: Numbers = (runs.loc[remedy, metric] - runs.loc[other, metric]).to_numpy()
    return found


def difference(runs: pd.DataFrame, remedy: str, metric: str, other: str = PLAIN) -> Difference:
    """Of one remedy to plain training, or to another."""
    from scipy import stats

    differences = paired(runs, remedy, other, metric)
    mean, number = float(differences.mean()), len(differences)
    if number < 2:
        return Difference(mean, np.nan, np.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * differences.std(ddof=1) / number**0.5
    return Difference(mean, mean - float(half), mean + float(half))


def worst_part(judge: Judge, kind: str, predicted: Numbers) -> tuple[Any, int, float]:
    """The part that fares worst on average over the seeds: name, people, accuracy."""
    found = judge.accuracies(kind, predicted == judge.labels).mean(0)
    worst = int(found.argmin())
    return judge.names[kind][worst], int(judge.sizes(kind)[worst]), float(found[worst])


def signs_of_hurt(runs: pd.DataFrame, rare: int) -> dict[str, list[str]]:
    """How each remedy is seen to hurt, for those that are; ``rare`` is training's rarest class."""
    means = runs.groupby(level="remedy", sort=False).mean()
    apart = means["rare, train"] - means["rare, validation"]
    found: dict[str, list[str]] = {}
    for name in means.index.drop([PLAIN, ORACLE], errors="ignore"):
        one, said = means.loc[name], found.setdefault(name, [])
        if apart[name] > max(BY_HEART, apart[PLAIN] + BY_HEART / 2):
            said.append(
                f"it learns class {rare} by heart: {one['rare, train']:.0%} right in training, "
                f"{one['rare, validation']:.0%} in validation"
            )
        if one["held"] and one["effective share"] < FEW:
            said.append(f"its held weights rest on {one['effective share']:.0%} of the samples")
        if BALANCED in means.index and name != BALANCED:
            more = difference(runs, name, "accuracy", BALANCED)
            if more.high < 0 or (np.isnan(more.high) and more.mean < 0):
                lost = Difference(-more.mean, -more.high, -more.low)
                said.append(f"it costs accuracy, {points(lost)} more than {BALANCED}")
    return {name: said for name, said in found.items() if said}


def conclude(
    runs: pd.DataFrame,
    predictions: Mapping[str, Numbers],
    judge: Judge,
    blind: str | None,
) -> tuple[str, list[str]]:
    """The remedy to take, and five sentences."""
    names = [name for name in predictions if name not in (PLAIN, ORACLE)]
    moves = {name: judge.moves(found == judge.labels) for name, found in predictions.items()}
    grouped = "group" in judge.parts
    metric = "worst group" if grouped else "score"
    means = runs[metric].groupby(level="remedy").mean()

    def better(one: str, other: str, confidence: float) -> bool:
        differences = paired(runs, one, other, metric)
        return beyond_chance(differences, moves[one] - moves[other], confidence)

    adjusted = 1 - (1 - CONFIDENCE) / max(1, len(names))
    clear = [name for name in names if better(name, PLAIN, adjusted)]
    if clear:
        best = max(clear, key=means.get)
        shown = take = next(name for name in clear if not better(best, name, CONFIDENCE))
        first = f"Take {take}, the simplest of those that are not clearly worse than the best"
    else:
        take, shown = PLAIN, max(names, key=means.get, default=PLAIN)
        first = f"No remedy is clearly better than plain training; the nearest is {shown}"
    gain, price = difference(runs, shown, metric), difference(runs, shown, "accuracy")
    part, people, share = worst_part(judge, "group" if grouped else "cell", predictions[take])
    whose = part if grouped else f"class {part[0]} in cluster {', '.join(map(str, part[1]))}"
    error = np.sqrt(share * (1 - share) / people)
    worst_off = (
        f"Worst off under {take}: {whose}, {people:,} people, of whom {share:.0%} are decided "
        f"rightly (standard error {error:.1%})."
    )
    number = len(runs.loc[PLAIN])
    sure = (
        "One seed has no spread, so nothing here is sure."
        if number < 2
        else f"“Clearly” is beyond chance at {CONFIDENCE:.0%}, over {number} seeds and over the "
        f"people of the validation data alike, adjusted for {len(names)} remedies."
    )
    if take == PLAIN and number < 5:
        sure += " More seeds would make the intervals narrower."
    last = "Without groups, clusters stand in for them: whom they do not see, this does not know."
    if blind is not None:
        last = f"Without groups, mind: {blind}."
    elif grouped:
        room = difference(runs, ORACLE, metric)
        rest = ": reweighting has little to offer here"
        if room.low > 0:
            rest = f", of which {shown} recovers {gain.mean / room.mean:.0%}"
        last = f"Headroom: a last layer fitted anew, groups known, has {points(room)}{rest}."
    what = "worst group" if grouped else "mean of worst class and worst label × cluster cell"
    sentences = [
        f"{first}: {points(gain)} in the {what}.",
        f"Its accuracy is {runs.loc[shown, 'accuracy'].mean():.1%}, {points(price)} against plain.",
        worst_off,
        sure,
        last,
    ]
    return take, sentences


def beyond_chance(differences: Numbers, moves: Numbers, confidence: float) -> bool:
    """Whether the mean of paired differences (seeds,) is above what is made by chance.

    ``moves`` (N,) is how each person moves it. The variances of seeds and people add up, by
    Satterthwaite's degrees of freedom.
    """
    from scipy import stats

    number = len(differences)
    if number < 2:
        return False
    of_seeds, of_people = differences.var(ddof=1) / number, (moves**2).sum()
    freedom = (number - 1) * (of_seeds + of_people) ** 2 / max(of_seeds**2, 1e-300)
    limit = stats.t.ppf((1 + confidence) / 2, freedom) * (of_seeds + of_people) ** 0.5
    return bool(differences.mean() > limit)


def as_text(found: Difference, unit: str = "", percent: bool = True) -> str:
    """A difference with its interval; shares in points.

    >>> as_text(Difference(0.1, 0.05, 0.15), " points")
    '+10.0 points (+5.0 to +15.0)'
    """
    scale, digits = (100, 1) if percent else (1, 2)
    mean, low, high = (f"{scale * value:+.{digits}f}".replace("-", "−") for value in found)
    return f"{mean}{unit}" + ("" if np.isnan(found.low) else f" ({low} to {high})")


def points(found: Difference) -> str:
    """A difference of shares in points."""
    return as_text(found, " points")
