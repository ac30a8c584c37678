"""Weights that were decided before the batch came: what the optimizer holds between renewals."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting import normalise
from irw_optim.weighting.local_scheme import Averaging, present_in
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
        vars(same).update(vars(self))
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


def check_sample_weights(weights: object, size: int | None = None) -> None:
    """Raise for weights, (N,), that are not of a data set of this ``size``, or are unusable."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights is {kind}: expected a floating-point tensor of shape (N,)")
    if weights.ndim != 1:
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected (N,)")
    renew = "make new ones with global_weights(...)"
    if size is not None and len(weights) != size:
        raise ValueError(
            f"weights has {len(weights)} entries but the data set has {size} samples: they are "
            f"stale or belong to another data set; {renew}"
        )
    if not weights.isfinite().all():
        broken = (~weights.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"weights has {len(broken)} NaN or infinite entries, the first at index {broken[0]}; "
            f"{renew}"
        )
    if bool((weights < 0).any()):
        raise ValueError(f"weights has negative entries, down to {float(weights.min()):g}")
    if not bool((weights > 0).any()):
        raise ValueError(f"weights has no positive entry: nobody would be drawn or count; {renew}")
