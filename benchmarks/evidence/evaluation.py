"""What one trained model does on one part of the data, in numbers."""

import math
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from benchmarks.data.sources import Samples
from benchmarks.data.tasks import Parts, Task
from irw_optim import metrics

SMALLEST = {"validation": 5, "test": 40}
"""A group with fewer samples in that part does not count there: its accuracy would be noise."""


class Trained(NamedTuple):
    """What a trained model says of the three parts, and what is needed to judge it.

    ``held`` are the weights that the training batches were drawn by, (N,), if they were held, and
    ``cluster`` is of the validation part.
    """

    task: Task
    parts: Parts
    logits: tuple[Tensor, Tensor, Tensor]
    held: Tensor | None
    cluster: np.ndarray


def everything(found: Trained) -> dict[str, float]:
    """The row of a run in the sweep: all of the test part, and what settings are chosen by."""
    numbers = judged(found, found.task.protected).items()
    shown = {n: value for n, value in numbers if n.startswith(("test ", "validation worst "))}
    return {"score without groups": cells(found).score} | shown


def with_signs(found: Trained) -> dict[str, float]:
    """The row of a run on unseen data: the groups, and what can be seen without them."""
    told = cells(found)
    cell = min((cell for cell in told.cells if cell.counted), key=lambda cell: cell.accuracy)
    numbers = {"score without groups": told.score, "cell": cell.accuracy, "cell size": cell.samples}
    both = judged(found, None).items()
    numbers |= {n: v for n, v in both if n.endswith(" accuracy") or " worst " in n}
    labels = found.parts[0].y
    rare = int(labels.bincount().argmin())
    for name, part in (("training", 0), ("test", 2)):
        of = found.parts[part].y == rare
        right = found.logits[part].argmax(1)[of] == rare
        numbers[f"{name} rare class"] = float(right.float().mean())
    held = torch.full((len(labels),), math.nan) if found.held is None else found.held
    each = [effective_share(held[labels == label]) for label in labels.unique()]
    return numbers | {"held": effective_share(held), "least held": min(each)}


def judged(found: Trained, protected: str | None) -> dict[str, float]:
    """What `evaluate` says of the validation and of the test part."""
    both = zip(SMALLEST.items(), found.parts[1:], found.logits[1:], strict=True)
    return {
        f"{part} {name}": value
        for (part, least), data, said in both
        for name, value in evaluate(said, data, protected, least).items()
    }


def effective_share(weights: Tensor) -> float:
    """The effective sample size of weights, (N,), as a share of N."""
    return float(weights.sum() ** 2 / weights.square().sum() / len(weights))


def evaluate(
    logits: Tensor, data: Samples, protected: str | None, smallest: int, tail: float = 0.1
) -> dict[str, float]:
    """Accuracy, the worst group of each grouping, MAD and TAD of the protected one, the losses.

    A group of fewer than ``smallest`` samples does not count; "tail loss" is of a share ``tail``.
    """
    predicted, true = logits.argmax(1).numpy(), data.y.numpy()
    losses = F.cross_entropy(logits, data.y, reduction="none").numpy()
    found = {"accuracy": float((predicted == true).mean())}
    large = {}
    for name, codes in data.groups.items():
        counted = np.bincount(codes)[codes] >= smallest
        large[name] = true[counted], predicted[counted], codes.numpy()[counted]
        found[f"worst {name}"] = min(metrics.group_accuracy(*large[name]).values())
    if protected is not None:
        found |= {"MAD": metrics.mad(*large[protected]), "TAD": metrics.tad(*large[protected])}
    found |= {"mean loss": float(losses.mean()), "VAR": metrics.loss_variance(losses)}
    return found | {"tail loss": metrics.worst_alpha_loss(losses, tail)}


def clusters(x: Tensor) -> np.ndarray:
    """Four k-means clusters of inputs, (N,): they stand in for groups nobody knows."""
    return KMeans(4, n_init=4, random_state=0).fit(x.numpy()).labels_


def cells(found: Trained) -> metrics.ClusterAccuracy:
    """Its worst label x cluster cell and worst class on the validation part."""
    return metrics.worst_cell_accuracy(found.parts[1].y, found.logits[1].argmax(1), found.cluster)
