"""What the models do on the validation data, and what may be concluded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from irw_optim.metrics import worst_alpha_loss, worst_cell_accuracy
from irw_optim.metrics._groups import intersect
from irw_optim.schemes.global_weights import FEW

from ._data import Numbers
from ._training import BALANCED, ORACLE, PLAIN

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95

BY_HEART = 0.2
"""So much better in training a class is that is learnt by heart."""

TOLD, MISLED, NEAR = 0.9, 20, 0.1
"""A shortcut tells that share of the classes, misleads as many, who fare so much worse."""


class Judge:
    """Measures models on people by ``"class"``, ``"cell"`` and, if known, ``"group"``.

    ``parts`` has everybody's number in ``names``, (N,), -1 for whoever counts nowhere.
    """

    def __init__(
        self, labels: Tensor, clusters: Numbers, groups: Numbers | None, min_cell: int
    ) -> None:
        self.labels = labels.numpy()
        found = worst_cell_accuracy(self.labels, self.labels, clusters, min_cell=min_cell)
        cells = [(cell.label, cell.clusters) for cell in found.cells if cell.counted]
        inside = [(self.labels == label) & np.isin(clusters, of) for label, of in cells]
        classes, class_of = intersect({"class": self.labels})
        self.names: dict[str, list[Any]] = {"class": classes, "cell": cells}
        cell_of = np.where(np.any(inside, 0), np.argmax(inside, 0), -1)
        self.parts: dict[str, Numbers] = {"class": class_of, "cell": cell_of}
        if groups is not None:
            names, member = intersect({"group": groups})
            sizes = np.bincount(member)
            large = sizes >= min_cell
            if not large.any():
                raise ValueError(
                    f"min_cell={min_cell}: the largest group has {sizes.max()} people: expected "
                    "more validation data, or a lower min_cell"
                )
            self.names["group"] = [names[number] for number in np.flatnonzero(large)]
            self.parts["group"] = np.where(large, large.cumsum() - 1, -1)[member]

    def sizes(self, kind: str) -> Numbers:
        part = self.parts[kind]
        return np.bincount(part[part >= 0])

    def accuracies(self, kind: str, right: Numbers) -> Numbers:
        """(M, parts), of M models' ``right`` (M, N)."""
        part, sizes = self.parts[kind], self.sizes(kind)
        inside = part >= 0
        hits = [np.bincount(part[inside], one[inside], len(sizes)) for one in right]
        return np.stack(hits) / sizes

    def moves(self, right: Numbers) -> Numbers:
        """(N,): how each person moves what to choose by, in the mean over the models.

        The root of their sum of squares is the standard error (delta method).
        """
        kinds = ["group"] if "group" in self.parts else ["class", "cell"]
        moves = np.zeros(right.shape[1])
        for kind in kinds:
            for one, accuracies in zip(right, self.accuracies(kind, right), strict=True):
                inside = self.parts[kind] == accuracies.argmin()
                off = (one[inside] - accuracies.min()) / inside.sum()
                moves[inside] += off / len(kinds) / len(right)
        return moves

    def measure(self, logits: Tensor) -> dict[str, float]:
        truth = torch.from_numpy(self.labels)
        right = (logits.argmax(1) == truth).numpy()[None]
        worst = {f"worst {k}": float(self.accuracies(k, right).min()) for k in self.parts}
        losses = nn.functional.cross_entropy(logits, truth, reduction="none").clamp(max=100.0)
        return {
            "accuracy": float(right.mean()),
            **worst,
            "score": (worst["worst class"] + worst["worst cell"]) / 2,
            "tail loss": worst_alpha_loss(losses, 0.1),
            "calibration error": calibration_error(logits, right[0]),
        }


def calibration_error(logits: Tensor, right: Numbers) -> float:
    from sklearn.calibration import calibration_curve

    confidence = logits.softmax(1).amax(1).clamp(0, 1).numpy()
    share, said = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    return float(np.abs(share - said).mean())


def unseen_by_clusters(inputs: Numbers | None, judge: Judge, right: Numbers) -> str | None:
    """Why the score by clusters may be blind, by plain training's ``right`` (seeds, N).

    A shortcut of one feature moves no cluster's centre: a tree with a leaf a class looks for one
    whose misled fare worse than the worst cell.
    """
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.tree import DecisionTreeClassifier

    least = float(judge.accuracies("cell", right).mean(0).min())
    if inputs is not None:
        leaves = max(2, len(judge.names["class"]))
        tree = DecisionTreeClassifier(max_leaf_nodes=leaves, class_weight="balanced")
        said = tree.fit(inputs, judge.labels).predict(inputs)
        told = balanced_accuracy_score(judge.labels, said)
        for label in judge.names["class"] if told >= TOLD else []:
            misled = (judge.labels == label) & (said != label)
            if misled.sum() >= MISLED and (share := float(right[:, misled].mean())) < least - NEAR:
                return (
                    f"feature {tree.tree_.feature[0]} alone tells {told:.0%} of the classes; of "
                    f"{misled.sum()} people of class {label} whom it misleads plain training gets "
                    f"{share:.0%} right, {least:.0%} in the worst cell: the clusters do not see "
                    "this shortcut, which the score may prefer"
                )
    if least > max(0.01, float(judge.accuracies("class", right).mean(0).min()) - 0.01):
        return (
            "no cluster fares worse than its class: the clusters say no more than the classes, and "
            "a group that they do not see would be missed"
        )
    return None


class Difference(NamedTuple):
    """A remedy minus plain training: mean over the seeds, and t interval, NaN for one seed."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0


def paired(runs: pd.DataFrame, remedy: str, metric: str, other: str) -> Numbers:
    differences: Numbers = (runs.loc[remedy, metric] - runs.loc[other, metric]).to_numpy()
    return differences


def difference(runs: pd.DataFrame, remedy: str, metric: str, other: str = PLAIN) -> Difference:
    from scipy import stats

    differences = paired(runs, remedy, metric, other)
    mean, number = float(differences.mean()), len(differences)
    if number < 2:
        return Difference(mean, np.nan, np.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * differences.std(ddof=1) / number**0.5
    return Difference(mean, mean - float(half), mean + float(half))


def worst_part(judge: Judge, kind: str, predicted: Numbers) -> tuple[Any, int, float]:
    """Name, people and accuracy of the part that fares worst."""
    found = judge.accuracies(kind, predicted == judge.labels).mean(0)
    worst = int(found.argmin())
    return judge.names[kind][worst], int(judge.sizes(kind)[worst]), float(found[worst])


def signs_of_hurt(runs: pd.DataFrame, rare: int) -> dict[str, list[str]]:
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
            lost = difference(runs, BALANCED, "accuracy", name)
            if lost.low > 0 or (np.isnan(lost.low) and lost.mean > 0):
                said.append(f"it costs accuracy, {as_text(lost)} more than {BALANCED}")
    return {name: said for name, said in found.items() if said}


def conclude(
    runs: pd.DataFrame, predictions: Mapping[str, Numbers], judge: Judge, blind: str | None
) -> tuple[str, list[str]]:
    names = [name for name in predictions if name not in (PLAIN, ORACLE)]
    moves = {name: judge.moves(found == judge.labels) for name, found in predictions.items()}
    kind, metric, what = "cell", "score", "mean of worst class and worst label × cluster cell"
    if grouped := "group" in judge.parts:
        kind, metric, what = "group", "worst group", "worst group"
    means = runs.groupby(level="remedy").mean()

    def better(one: str, other: str, confidence: float) -> bool:
        differences = paired(runs, one, metric, other)
        return beyond_chance(differences, moves[one] - moves[other], confidence)

    adjusted = 1 - (1 - CONFIDENCE) / max(1, len(names))
    clear = [name for name in names if better(name, PLAIN, adjusted)]
    if clear:
        best = max(clear, key=means[metric].get)
        shown = take = next(name for name in clear if not better(best, name, CONFIDENCE))
        first = f"Take {take}, the simplest of those that are not clearly worse than the best"
    else:
        take, shown = PLAIN, max(names, key=means[metric].get, default=PLAIN)
        first = f"No remedy is clearly better than plain training; the nearest is {shown}"
    gain, price = difference(runs, shown, metric), difference(runs, shown, "accuracy")
    number = len(runs.loc[PLAIN])
    sure = "One seed has no spread, so nothing here is sure."
    if number > 1:
        sure = (
            f"“Clearly” is beyond chance at {CONFIDENCE:.0%}, over {number} seeds and the "
            f"people of the validation data, adjusted for {len(names)} remedies."
        )
    if take == PLAIN and number < 5:
        sure += " More seeds would make the intervals narrower."
    last = f"Without groups, mind: {blind}."
    if grouped:
        room = difference(runs, ORACLE, metric)
        rest = ": reweighting has little to offer here"
        if room.low > 0:
            rest = f", of which {shown} recovers {gain.mean / room.mean:.0%}"
        last = f"Headroom: a last layer fitted anew, groups known, has {as_text(room)}{rest}."
    elif blind is None:
        last = "Without groups, clusters stand in for them, and do not see everybody."
    part, people, share = worst_part(judge, kind, predictions[take])
    whose = part if grouped else f"class {part[0]} in cluster {', '.join(map(str, part[1]))}"
    error = np.sqrt(share * (1 - share) / people)
    worst_off = f"{people:,} people, of whom {share:.0%} are decided rightly"
    return take, [
        f"{first}: {as_text(gain)} in the {what}.",
        f"Its accuracy is {means.loc[shown, 'accuracy']:.1%}, {as_text(price)} against plain.",
        f"Worst off under {take}: {whose}, {worst_off} (standard error {error:.1%}).",
        sure,
        last,
    ]


def beyond_chance(differences: Numbers, moves: Numbers, confidence: float) -> bool:
    """Whether the mean of paired differences (seeds,) is above chance, by people's moves (N,), too.

    The variances add up, by Satterthwaite's degrees of freedom.
    """
    from scipy import stats

    number = len(differences)
    if number < 2:
        return False
    of_seeds = differences.var(ddof=1) / number
    variance = of_seeds + (moves**2).sum()
    freedom = (number - 1) * variance**2 / max(of_seeds**2, 1e-300)
    limit = stats.t.ppf((1 + confidence) / 2, freedom) * variance**0.5
    return bool(differences.mean() > limit)


def as_text(found: Difference, unit: str = " points", percent: bool = True) -> str:
    if np.isnan(found.mean):
        return ""
    scale, digits = (100, 1) if percent else (1, 2)
    mean, low, high = (f"{scale * value:+.{digits}f}".replace("-", "−") for value in found)
    return f"{mean}{unit}" + ("" if np.isnan(found.low) else f" ({low} to {high})")
