"""What one trained model does on one part of the data, in numbers."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from benchmarks.data.sources import Samples
from irw_optim.metrics import (
    group_accuracy,
    loss_variance,
    mad,
    tad,
    worst_alpha_loss,
    worst_cell_accuracy,
)

SMALLEST = {"validation": 5, "test": 40}
"""A group with fewer samples in that part does not count there: its accuracy would be noise."""


def evaluate(
    logits: Tensor, data: Samples, protected: str | None, smallest: int, tail: float = 0.1
) -> dict[str, float]:
    """Accuracy, the worst group of each grouping, MAD and TAD of the protected one, the losses.

    Args:
        logits: (N, classes).
        data: whose they are.
        protected: the grouping for MAD and TAD; None for neither.
        smallest: the samples that a group needs to count.
        tail: the share of the losses in "tail loss".
    """
    predicted, true = logits.argmax(1).numpy(), data.y.numpy()
    losses = F.cross_entropy(logits, data.y, reduction="none").numpy()
    found = {"accuracy": float((predicted == true).mean())}
    large = {}
    for name, codes in data.groups.items():
        counted = np.bincount(codes)[codes] >= smallest
        large[name] = true[counted], predicted[counted], codes.numpy()[counted]
        found[f"worst {name}"] = min(group_accuracy(*large[name]).values())
    if protected is not None:
        found |= {"MAD": mad(*large[protected]), "TAD": tad(*large[protected])}
    found |= {"mean loss": float(losses.mean()), "VAR": loss_variance(losses)}
    return found | {"tail loss": worst_alpha_loss(losses, tail)}


def clusters(x: Tensor, starts: int = 4) -> np.ndarray:
    """Four k-means clusters of inputs, (N,): they stand in for groups nobody knows."""
    return KMeans(4, n_init=starts, random_state=0).fit(x.numpy()).labels_


def score_without_groups(logits: Tensor, data: Samples, cluster: np.ndarray) -> float:
    """Mean of the worst label x cluster accuracy and the worst class accuracy."""
    return worst_cell_accuracy(data.y, logits.argmax(1), cluster).score
