"""Backward passes that are weighed together, as the one batch that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses


class Pass(NamedTuple):
    """The losses of one backward pass, without their graph, and the factor that came with it.

    The factor is the gradient that arrived at the scalar: a gradient scaler's, 1/accumulation.
    """

    batch: PerSampleLosses
    factor: Tensor | float


def as_one(passes: Sequence[Pass]) -> PerSampleLosses:
    """The samples of all passes; ``value`` and ``scale`` have no meaning for several."""
    if len(passes) == 1:
        return passes[0].batch
    batches = [batch for batch, _ in passes]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    counted = any(batch.counts is not None for batch in batches)
    return PerSampleLosses(
        torch.cat([batch.losses for batch in batches]),
        batches[0].value,
        1.0,
        torch.cat(labels) if len(labels) == len(batches) else None,
        torch.cat([counts_of(batch) for batch in batches]) if counted else None,
    )


def some_of(batch: PerSampleLosses, rows: slice | Tensor) -> PerSampleLosses:
    """Some samples of a batch, or all in another order; ``value`` and ``scale`` stay."""
    counts = counts_of(batch)[rows]
    return batch._replace(
        losses=batch.losses[rows],
        labels=None if batch.labels is None else batch.labels[rows],
        counts=None if batch.counts is None else counts,
        elements=float(counts.sum()),
    )


def elements_of(batch: PerSampleLosses) -> float:
    """How many elements the samples of a batch have together."""
    return float(len(batch.losses) if batch.elements is None else batch.elements)


def counts_of(batch: PerSampleLosses) -> Tensor:
    """How many elements each sample has, also where they are equally many: (B,) int64."""
    if batch.counts is not None:
        return batch.counts
    size = len(batch.losses)
    each = round(elements_of(batch) / max(1, size))
    return torch.full((size,), each, dtype=torch.int64, device=batch.losses.device)
