"""The local scheme in each class by itself, every class with the same total weight.

Between classes the sign of <g_i, g_S> is little but the label: those of the class that has the
majority in S help it, the others do not. Inside a class it says who is like the worst-off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from irw_optim.backward.passes import some_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.metrics._inputs import ArrayLike, as_classes
from irw_optim.schemes.dataset_gradients import DatasetGradients
from irw_optim.schemes.dataset_over_ranks import DatasetOverRanks
from irw_optim.weighting.local_scheme import LocalScheme, present_in
from irw_optim.weighting.record import StepRecord


@dataclass(frozen=True)
class ByLoss:
    """Scores in proportion to the loss: the control, for which no gradient is needed."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        """Scores of a batch, (B,)."""
        return losses.detach()


@dataclass(frozen=True)
class WithinClasses(LocalScheme):
    """Weighs the samples of each class against each other; of C classes each has the weight 1 / C.

    Attributes:
        given: (N,) int64, the classes where the criterion's target does not show them.
    """

    given: Tensor | None = None

    def decide(
        self, batch: PerSampleLosses, rows: PerSampleGradients, removed: Tensor | None = None
    ) -> StepRecord:
        """The weights of all samples; in a class without a positive score they are even."""
        assert isinstance(rows, DatasetGradients | DatasetOverRanks)
        labels = batch.labels if self.given is None else self.given.to(batch.losses.device)
        if labels is None:
            raise ValueError(
                "weights within classes need one class a sample, and the criterion's target shows "
                "none: give labels=, one class for each sample of the data set"
            )
        batch = batch._replace(labels=labels)
        present = present_in(batch)
        inside = torch.ones_like(labels, dtype=torch.bool) if present is None else present
        members = [(labels == label) & inside for label in labels[inside].unique()]
        records = []
        for own in members:
            out = None if removed is None else removed[own]
            if out is not None and bool(out.all()):
                out = torch.zeros_like(out)  # nobody of a class of which all would be
            records.append(super().decide(some_of(batch, own), rows.of(own), out))

        def joined(name: str) -> Tensor:
            parts = [getattr(record, name) for record in records]
            whole = torch.cat(parts).new_zeros(len(labels))
            for own, part in zip(members, parts, strict=True):
                whole[own] = part.to(whole)
            return whole

        return StepRecord(
            worst_off=joined("worst_off"),
            outliers=joined("outliers"),
            scores=joined("scores"),
            weights=joined("weights") / len(members),
            fallback=torch.stack([record.fallback for record in records]).all(),
            losses=batch.losses.detach(),
            labels=labels,
        )


def class_codes(labels: ArrayLike | None, size: int) -> Tensor | None:
    """Labels of any kind as numbers from 0, (N,) int64; numbers that nobody has are no matter.

    Raises:
        ValueError: of another length, missing, or with fractions.

    >>> class_codes(["b", "a", "b"], 3), class_codes([2.0, 7.0], 2)
    (tensor([1, 0, 1]), tensor([0, 1]))
    """
    if labels is None:
        return None
    classes = as_classes("labels", labels)
    if len(classes) != size:
        raise ValueError(
            f"labels has {len(classes)} entries and the data set {size} samples: expected one "
            "class for each, in the order of the data set"
        )
    return torch.from_numpy(np.unique(classes, return_inverse=True)[1].astype(np.int64))
