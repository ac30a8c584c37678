"""What one trained model does on one part of the data, in numbers."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fairness.data import Samples
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

CLUSTERS = 4
TAIL = 0.1


def evaluate(logits: Tensor, data: Samples, protected: str, smallest: int) -> dict[str, float]:
    """Accuracy, the worst group of each grouping, MAD and TAD of the protected one, the losses.

    Args:
        logits: (N, classes).
        data: whose they are.
        protected: the grouping for MAD and TAD.
        smallest: the samples that a group needs to count.
    """
    predicted, true = logits.argmax(1).numpy(), data.y.numpy()
    losses = F.cross_entropy(logits, data.y, reduction="none").numpy()
    worst = {
        f"worst {name}": min(accuracy_of_large_groups(true, predicted, codes.numpy(), smallest))
        for name, codes in data.groups.items()
    }
    codes = data.groups[protected].numpy()
    large = in_large_groups(codes, smallest)
    return {
        "accuracy": float((predicted == true).mean()),
        **worst,
        "MAD": mad(true[large], predicted[large], codes[large]),
        "TAD": tad(true[large], predicted[large], codes[large]),
        "mean loss": float(losses.mean()),
        "VAR": loss_variance(losses),
        "tail loss": worst_alpha_loss(losses, TAIL),
    }


def in_large_groups(codes: np.ndarray, smallest: int) -> np.ndarray:
    """Who is in a group with so many samples, (N,) bool."""
    return np.bincount(codes)[codes] >= smallest


def accuracy_of_large_groups(
    true: np.ndarray, predicted: np.ndarray, codes: np.ndarray, smallest: int
) -> list[float]:
    large = in_large_groups(codes, smallest)
    return list(group_accuracy(true[large], predicted[large], codes[large]).values())


def clusters(validation: Samples) -> np.ndarray:
    """k-means clusters of the validation inputs: they stand in for groups nobody knows."""
    fitted = KMeans(CLUSTERS, n_init=4, random_state=0).fit(validation.x.numpy())
    return fitted.labels_


def score_without_groups(logits: Tensor, data: Samples, cluster: np.ndarray) -> float:
    """Mean of the worst label x cluster accuracy and the worst class accuracy."""
    return worst_cell_accuracy(data.y, logits.argmax(1), cluster).score
