"""Who got the weight in training: notes taken from `IRWOptimizer.last_step`, changing nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from irw_optim import StepRecord


class Diary:
    """The notes of one training run over N people.

    Steps of a warm-up, which weigh everybody alike, count for the effective sample size only.

    Args:
        labels: (N,) classes of the training split.
    """

    def __init__(self, labels: NDArray[np.int64]) -> None:
        self.labels = torch.from_numpy(labels)
        self.weight = torch.zeros(len(labels), dtype=torch.float64)
        self.seen = torch.zeros(len(labels), dtype=torch.float64)
        self.removed = torch.zeros(len(labels), dtype=torch.float64)
        self.class_shares: list[float] = []
        self.effective: list[float] = []
        self.epochs: list[dict[str, float]] = []

    def note(self, step: StepRecord | None, who: Tensor) -> None:
        """Note one step, on the people with the indices ``who``, of shape (B,)."""
        assert step is not None, "a diary is kept after optimizer.step()"
        self.effective.append(step.effective_sample_size / len(who))
        if not step.worst_off.any():  # a step of the warm-up
            return
        weights = step.weights.double()
        self.weight.index_add_(0, who, weights)
        self.seen.index_add_(0, who, torch.ones_like(weights))
        self.removed.index_add_(0, who, step.outliers.double())
        by_class = torch.zeros(2, dtype=torch.float64).index_add_(0, self.labels[who], weights)
        self.class_shares.append(float(by_class.max()))

    def close_epoch(self, tail_loss: float) -> None:
        """Note what an epoch led to: the mean of the worst test losses."""
        share = sum(self.effective) / len(self.effective)
        self.epochs.append({"effective share": share, "tail loss": tail_loss})
        self.effective.clear()

    def history(self) -> pd.DataFrame:
        """One row an epoch, from 1: ``effective share`` of the batch, in [0, 1], ``tail loss``."""
        return pd.DataFrame(self.epochs, index=range(1, len(self.epochs) + 1))

    def weight_ratio(self, group: pd.Series[str]) -> pd.Series[float]:
        """Each group's share of the weight, divided by its share of the samples seen."""
        table = pd.DataFrame({"group": group, "weight": self.weight, "seen": self.seen})
        shares = table.groupby("group").sum() / table[["weight", "seen"]].sum()
        return shares["weight"] / shares["seen"]

    def removed_share(self, group: pd.Series[str]) -> pd.Series[float]:
        """The share of each group's samples that an outlier filter removed."""
        table = pd.DataFrame({"group": group, "removed": self.removed, "seen": self.seen})
        sums = table.groupby("group").sum()
        return sums["removed"] / sums["seen"]

    def largest_class_share(self) -> float:
        """How much of a batch's weight lies on one class, averaged over the steps."""
        return sum(self.class_shares) / len(self.class_shares)
