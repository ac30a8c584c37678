"""What one trained model does on the test split, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from adult_data import People
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from irw_optim.metrics import group_accuracy, loss_variance, mad, tad, worst_alpha_loss


class Metric(NamedTuple):
    """A column of the table.

    Attributes:
        name: its head, and its name in a sentence.
        meaning: what it is, in words.
        sign: 1 where higher is better, -1 where lower is.
        percent: whether it is shown in per cent, and its differences in points.
    """

    name: str
    meaning: str
    sign: int
    percent: bool = True


RACE_SEX, INCOME_SEX = "race × sex", "income × sex"
PARTITIONS = {RACE_SEX: ("race", "sex"), INCOME_SEX: ("income", "sex")}

ACCURACY = Metric("accuracy", "share of right predictions", 1)
WORST_RACE_SEX = Metric(f"worst {RACE_SEX}", "accuracy of the worst-off of these 10 groups", 1)
WORST_INCOME_SEX = Metric(f"worst {INCOME_SEX}", "accuracy of the worst-off of these 4 groups", 1)
MAD = Metric("MAD", f"largest gap between the accuracies of two groups of {RACE_SEX}", -1)
TAD = Metric("TAD", f"sum over the groups of {RACE_SEX} of |group's accuracy − accuracy|", -1)
MEAN_LOSS = Metric("mean loss", "mean of the test losses (cross entropy)", -1, percent=False)
VAR = Metric("VAR", "variance of the test losses", -1, percent=False)
TAIL_LOSS = Metric("tail loss", "mean of the worst share α of the test losses", -1, percent=False)
METRICS = (ACCURACY, WORST_RACE_SEX, WORST_INCOME_SEX, MAD, TAD, MEAN_LOSS, VAR, TAIL_LOSS)


@dataclass(frozen=True)
class Evaluation:
    """One model on one split.

    Attributes:
        metrics: a number for each of `METRICS`, by name; shares and gaps in [0, 1].
        accuracy: {partition: {group: accuracy}}, for the partitions of `PARTITIONS`.
    """

    metrics: dict[str, float]
    accuracy: dict[str, dict[str, float]]


def evaluate(logits: Tensor, people: People, alpha: float) -> Evaluation:
    """Measure what ``logits``, of shape (N, 2), say of ``people``.

    Args:
        logits: of a model, in the order of ``people``.
        people: the split; here, and only here, race and sex are looked at.
        alpha: share of the losses in the tail, in (0, 1].
    """
    labels, decided = people.labels, logits.argmax(1)
    losses = per_sample_losses(logits, people)
    groups = {name: people.group_of(*columns) for name, columns in PARTITIONS.items()}
    accuracy = {name: group_accuracy(labels, decided, group) for name, group in groups.items()}
    values = {
        ACCURACY: float((decided.numpy() == labels).mean()),
        WORST_RACE_SEX: min(accuracy[RACE_SEX].values()),
        WORST_INCOME_SEX: min(accuracy[INCOME_SEX].values()),
        MAD: mad(labels, decided, groups[RACE_SEX]),
        TAD: tad(labels, decided, groups[RACE_SEX]),
        MEAN_LOSS: float(losses.mean()),
        VAR: loss_variance(losses),
        TAIL_LOSS: worst_alpha_loss(losses, alpha),
    }
    return Evaluation({metric.name: value for metric, value in values.items()}, accuracy)


def per_sample_losses(logits: Tensor, people: People) -> Tensor:
    """Cross entropies, of shape (N,)."""
    return F.cross_entropy(logits, torch.from_numpy(people.labels), reduction="none")


def moved_threshold(logits: Tensor, labels: NDArray[np.int64]) -> Tensor:
    """Decide as if the classes were equally frequent, without training again.

    Subtracts the logarithm of each class's share (Menon et al. 2021, "Long-tail learning via logit
    adjustment"): with two classes, the threshold moves from 1/2 to the share of the second.

    Args:
        logits: (N, 2).
        labels: of the training split.
    """
    return logits - torch.from_numpy(np.bincount(labels) / len(labels)).log().to(logits.dtype)


def group_sizes(people: People, partition: str) -> pd.Series[int]:
    """How many people each group has, the largest first."""
    return people.group_of(*PARTITIONS[partition]).value_counts()
