"""The schemes beside the local one: weights held from before the batch came, and class by class."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irw_optim.backward.passes import some_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.metrics._groups import ArrayLike, as_classes
from irw_optim.schemes.dataset_gradients import DatasetGradients
from irw_optim.weighting import normalise
from irw_optim.weighting.local_scheme import Averaging, LocalScheme, present_in
from irw_optim.weighting.record import StepRecord


class HeldWeights:
    """Takes the place of an optimizer's local scheme: the weights of the batch's own samples.

    Batches that are ``resampled``, drawn in proportion to the weights, make plain steps.
    """

    needs_gradients = False

    def __init__(self, resampled: bool) -> None:
        self.resampled = resampled
        self.record: StepRecord | None = None
        self.indices: Tensor | None = None

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients | None = None) -> StepRecord:
        """The held weights of the batch's samples, renormalised; uniform where nobody has any."""
        if self.resampled:
            return Averaging().decide(batch, rows)
        losses = batch.losses.detach()
        indices, record = self._selected(len(losses)), self.record
        assert record is not None  # or it would have been said
        held, present = record.weights[indices].to(losses.device), present_in(batch)
        if present is not None:  # as in every batch, those whose target is ignored are not there
            held = held * present
        weights, fallback = normalise(held, present)
        return StepRecord(
            worst_off=record.worst_off[indices],
            outliers=record.outliers[indices],
            scores=record.scores[indices],
            weights=weights,
            fallback=fallback,
            losses=losses,
            labels=batch.labels,
        )

    def over_ranks(self, ranks: Ranks) -> HeldWeights:
        """What decides for the batch of all processes; errors as `decide`'s, on all of them alike.

        Every one holds all weights: it takes an all-gather of B indices.
        """
        if self.resampled:
            return self
        size = ranks.sizes[ranks.rank]
        failure: Exception | None = None
        try:
            told = self._selected(size)
        except (RuntimeError, ValueError, IndexError) as error:
            if self.record is None:  # nowhere, then: nobody waits
                raise
            # The others wait for as many indices, and are told by ones that cannot be.
            told, failure = torch.full((size,), -1, device=self.record.weights.device), error
        everybody = ranks.gather(told)
        if failure is not None:
            raise failure
        if bool((everybody < 0).any()):
            raise RuntimeError(
                "another process does not know which samples its batch holds, or they are not "
                "those of the weights: its own error says more"
            )
        whole = copy(self)
        whole.indices = everybody
        return whole

    def __copy__(self) -> HeldWeights:
        """The same weights for the same batch, whatever batch comes next."""
        same = HeldWeights(self.resampled)
        same.record, same.indices = self.record, self.indices
        return same

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the weights, and is told of its own batches."""
        return {**vars(self), "indices": None}

    def _selected(self, size: int) -> Tensor:
        """The indices of a batch of so many samples, where the weights are: (B,)."""
        record, indices = self.record, self.indices
        if indices is None and not size:  # a process without samples
            indices = torch.empty(0)
        if record is None or indices is None:
            raise RuntimeError(
                "the global scheme does not know which samples this batch holds: iterate over it, "
                "for batch in scheme, or call scheme.select(indices) before the criterion"
            )
        if len(indices) != size:
            raise ValueError(
                f"the batch has {size} losses but {len(indices)} indices were selected: "
                "expected the losses of the batch that the scheme yielded last"
            )
        known = len(record.weights)
        if size and not 0 <= int(indices.min()) <= int(indices.max()) < known:
            raise IndexError(
                f"the batch has the indices {int(indices.min())} to {int(indices.max())}, but the "
                f"weights are those of {known} samples: they are stale or belong to another data "
                "set; call scheme.renew()"
            )
        return indices.to(record.weights.device, torch.int64)


@dataclass(frozen=True)
class WithinClasses(LocalScheme):
    """Weighs the samples of each class against each other; of C classes each has the weight 1 / C.

    Between classes the sign of <g_i, g_S> is little but the label: those of the class that has the
    majority in S help it, the others do not. Inside a class it says who is like the worst-off. The
    classes are ``given``, (N,) int64, or those of the criterion's target.
    """

    given: Tensor | None = None

    def decide(
        self, batch: PerSampleLosses, rows: PerSampleGradients, removed: Tensor | None = None
    ) -> StepRecord:
        """The weights of all samples; in a class without a positive score they are even."""
        assert isinstance(rows, DatasetGradients)
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
        places = torch.cat([own.nonzero().squeeze(1) for own in members])

        def joined(name: str) -> Tensor:
            parts = torch.cat([getattr(record, name) for record in records])
            return parts.new_zeros(len(labels)).index_copy(0, places, parts)

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
    """Labels of any kind as numbers from 0, (N,) int64; numbers that nobody has are no matter."""
    if labels is None:
        return None
    classes = as_classes("labels", labels)
    if len(classes) != size:
        raise ValueError(
            f"labels has {len(classes)} entries and the data set {size} samples: expected one "
            "class for each, in the order of the data set"
        )
    return torch.from_numpy(np.unique(classes, return_inverse=True)[1].astype(np.int64))
