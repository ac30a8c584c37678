"""What a run says about the methods, in sentences made from its numbers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from adult_report.differences import CONFIDENCE, Difference, difference
from adult_report.evaluation import (
    ACCURACY,
    INCOME_SEX,
    MEAN_LOSS,
    METRICS,
    PARTITIONS,
    RACE_SEX,
    TAIL_LOSS,
    WORST_INCOME_SEX,
    WORST_RACE_SEX,
    group_sizes,
)
from adult_report.runs import MOVED, PLAIN, Runs, mean_and_sd

OURS = ("IRW", "IRW, centred", "IRWO")
ACCURACIES = (WORST_RACE_SEX, WORST_INCOME_SEX, ACCURACY)
SIMPLER = (MOVED, "class-balanced", "CVaR")


@dataclass(frozen=True)
class Finding:
    """A heading and the sentences under it."""

    title: str
    sentences: list[str]


def findings(runs: Runs) -> list[Finding]:
    """Everything there is to say, gains and losses alike."""
    metrics = runs.metrics()
    return [
        Finding("What IRW did", [headline(metrics, method) for method in OURS]),
        Finding(
            "IRW against what is simpler",
            [short_comparison(metrics, ours, other) for ours in OURS[:2] for other in SIMPLER],
        ),
        Finding("The price of a smaller tail loss", tail_and_mean(metrics)),
        Finding("Where the weight went in training", where_the_weight_went(runs)),
        Finding(
            "Each method against plain training",
            [comparison(metrics, method, PLAIN) for method in runs.methods if method != PLAIN],
        ),
        Finding("How far this goes", how_to_read(runs)),
    ]


def headline(metrics: pd.DataFrame, method: str) -> str:
    """What a method did to the worst groups and to everybody."""
    whose = (f"the worst group of {RACE_SEX}", f"the worst group of {INCOME_SEX}", "everybody")
    found = [difference(metrics, method, PLAIN, metric) for metric in ACCURACIES]
    changes = [
        f"{CHANGES[d.verdict]} the accuracy of {who} ({d})"
        for d, who in zip(found, whose, strict=True)
    ]
    return f"Against plain training, {method} {joined(changes)}."


CHANGES = {
    "better": "raised",
    "worse": "lowered",
    "no clear difference": "did not clearly change",
}


def comparison(metrics: pd.DataFrame, method: str, baseline: str) -> str:
    """All metrics of one method beside another, sorted by what may be said of them."""
    found = [difference(metrics, method, baseline, metric) for metric in METRICS]
    parts = [
        f"{verdict}: {joined(listed(d for d in found if d.verdict == verdict))}"
        for verdict in CHANGES
        if any(d.verdict == verdict for d in found)
    ]
    return f"{method} against {baseline}. {capitalised('; '.join(parts))}."


def short_comparison(metrics: pd.DataFrame, method: str, baseline: str) -> str:
    """The accuracies of one method beside another's."""
    found = [difference(metrics, method, baseline, metric) for metric in ACCURACIES]
    parts = [f"{d.metric.name} {d} ({d.verdict})" for d in found]
    return f"{method} against {baseline}: {joined(parts)}."


def tail_and_mean(metrics: pd.DataFrame) -> list[str]:
    """Which methods bought a smaller tail loss with a larger mean loss."""
    means = mean_and_sd(metrics)[0][[TAIL_LOSS.name, MEAN_LOSS.name]]
    even = math.log(2)
    tail_before, mean_before = means.loc[PLAIN]
    reference = (
        f"Even odds for everybody have mean and tail loss ln 2 = {even:.2f}, and VAR 0: with a "
        "larger mean loss, a smaller tail loss or VAR is in part a model less sure of everybody."
    )
    sentences = [reference]
    for method in means.index.drop(PLAIN):
        tail = difference(metrics, method, PLAIN, TAIL_LOSS)
        mean = difference(metrics, method, PLAIN, MEAN_LOSS)
        if (tail.verdict, mean.verdict) == ("better", "worse"):
            tail_now, mean_now = means.loc[method]
            sentences.append(
                f"{method}: tail loss {tail_before:.2f} → {tail_now:.2f}, mean loss "
                f"{mean_before:.2f} → {mean_now:.2f}, which is "
                f"{(mean_now - mean_before) / (even - mean_before):.0%} of the way to even odds."
            )
    return sentences


def where_the_weight_went(runs: Runs) -> list[str]:
    """Which class and which groups had the weight, and how many samples carried a step."""
    class_share = runs.largest_class_share()
    ratio, _ = mean_and_sd(runs.weight_ratio(INCOME_SEX))
    last_epoch = mean_and_sd(runs.history("effective share"))[0].iloc[:, -1]
    larger = max(runs.train.labels.mean(), 1 - runs.train.labels.mean())
    sentences = [
        f"Of the samples {larger:.0%} are of the larger class; plain training weighs all alike."
    ]
    for method in ratio.index.drop(PLAIN):
        mean = ratio.loc[method]
        sentences.append(
            f"{method}: {class_share[method]:.0%} of a batch's weight lay on one class; in the "
            f"last epoch a step rested on {last_epoch[method]:.0%} of the batch (effective sample "
            f"size); per head, {mean.idxmax()} had {mean.max():.2f} times the average weight and "
            f"{mean.idxmin()} {mean.min():.2f} times."
        )
    return sentences + removed_outliers(runs)


def removed_outliers(runs: Runs) -> list[str]:
    """Whom an outlier filter removed, for each method that has one."""
    sentences = []
    for partition in (INCOME_SEX, RACE_SEX):
        shares, _ = mean_and_sd(runs.removed_share(partition))
        for method in shares.index[shares.gt(0).any(axis=1)]:
            share = shares.loc[method]
            sentences.append(
                f"{method} removed as outliers, of the groups of {partition}, most often "
                f"{share.idxmax()} ({share.max():.1%} of the times that one was seen), least often "
                f"{share.idxmin()} ({share.min():.1%})."
            )
    return sentences


def how_to_read(runs: Runs) -> list[str]:
    """What the differences are, and what they cannot show."""
    seeds = len(runs.seeds)
    rule = (
        "one seed has no spread, so that no difference is called clear"
        if seeds < 2
        else f"it is called clear where its {CONFIDENCE:.0%} t interval over the {seeds} seeds "
        "excludes 0; many are looked at, so some will be clear by chance"
    )
    difference_means = (
        "A difference is the mean over the seeds of one method minus the other with the same seed, "
        f"± the standard deviation of these differences; {rule}."
    )
    worst = " ".join(worst_group(runs, partition) for partition in PARTITIONS)
    smallest = group_sizes(runs.test, RACE_SEX).tail(1)
    spread_lacks = (
        "The seeds vary the initialisation and the order of the batches; the test split stays the "
        f"same, and who happens to be in it is in no spread. {worst} Of the smallest group, "
        f"{smallest.index[0]}, one person is {100 / smallest.iloc[0]:.1f} points."
    )
    recipe = "With another recipe (`--optimizer`, `--epochs`) the methods may rank differently."
    return [difference_means, spread_lacks, recipe]


def worst_group(runs: Runs, partition: str) -> str:
    """Which group plain training serves worst, and how well its accuracy is known."""
    accuracy = runs.accuracy(partition).loc[PLAIN].mean()
    group, p = accuracy.idxmin(), accuracy.min()
    size = group_sizes(runs.test, partition)[group]
    return (
        f"The worst group of {partition} in plain training is {group}: {100 * p:.1f} % of {size:,} "
        f"people, with a standard error of {100 * math.sqrt(p * (1 - p) / size):.1f} points."
    )


def listed(found: Iterable[Difference]) -> list[str]:
    """Each difference with its name."""
    return [f"{d.metric.name} ({d})" for d in found]


def joined(parts: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def capitalised(text: str) -> str:
    """The first letter as a capital, the rest as it is."""
    return text[:1].upper() + text[1:]
