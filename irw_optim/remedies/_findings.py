"""Remedies beside plain training, seed by seed, and what may be concluded, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from irw_optim.remedies._measuring import Judge, Numbers
from irw_optim.remedies._methods import BALANCED, ORACLE, PLAIN
from irw_optim.schemes.class_by_class import FEW

if TYPE_CHECKING:
    import pandas as pd

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


def worst_part(judge: Judge, kind: str, predicted: Numbers) -> tuple[Any, int, float]:
    """The part that fares worst on average over the seeds: name, people, accuracy."""
    found = judge.accuracies(kind, predicted == judge.labels).mean(0)
    worst = int(found.argmin())
    return judge.names[kind][worst], int(judge.sizes(kind)[worst]), float(found[worst])


def difference(runs: pd.DataFrame, remedy: str, metric: str, other: str = PLAIN) -> Difference:
    """Of one remedy to plain training, or to another."""
    return paired(runs.loc[remedy, metric].to_numpy(), runs.loc[other, metric].to_numpy())


def signs_of_hurt(runs: pd.DataFrame, rare: int) -> dict[str, list[str]]:
    """How each remedy is seen to hurt, for those that are.

    Args:
        runs: of all remedies and seeds.
        rare: the class that is rarest in training.
    """
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
    right = {name: predicted == judge.labels for name, predicted in predictions.items()}
    scores = {name: judge.score(right[name]) for name in predictions}
    grouped = "group" in judge.parts

    def better(one: str, other: str, confidence: float) -> bool:
        (values, moves), (others, moves_of_other) = scores[one], scores[other]
        return beyond_chance(values - others, moves - moves_of_other, confidence)

    def mean(name: str) -> float:
        return float(scores[name][0].mean())

    adjusted = 1 - (1 - CONFIDENCE) / max(1, len(names))
    clear = [name for name in names if better(name, PLAIN, adjusted)]
    if clear:
        best = max(clear, key=mean)
        shown = take = next(name for name in clear if not better(best, name, CONFIDENCE))
        first = f"Take {take}, the simplest of those that are not clearly worse than the best"
    else:
        take, shown = PLAIN, max(names, key=mean, default=PLAIN)
        first = f"No remedy is clearly better than plain training; the nearest is {shown}"
    gain = paired(scores[shown][0], scores[PLAIN][0])
    price = difference(runs, shown, "accuracy")
    part, people, share = worst_part(judge, "group" if grouped else "cell", predictions[take])
    whose = part if grouped else f"class {part[0]} in cluster {', '.join(map(str, part[1]))}"
    error = np.sqrt(share * (1 - share) / people)
    worst_off = (
        f"Worst off under {take}: {whose}, {people:,} people, of whom {share:.0%} are decided "
        f"rightly (standard error {error:.1%})."
    )
    number = len(scores[PLAIN][0])
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
        room = paired(scores[ORACLE][0], scores[PLAIN][0])
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
    """Whether a mean difference is above what the seeds and the people make by chance.

    Args:
        differences: (seeds,) paired.
        moves: (N,) how each person moves their mean.
        confidence: of the t interval; the variances add up, by Satterthwaite's degrees of freedom.
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
