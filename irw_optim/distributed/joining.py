"""The batch of all ranks, from what each says of its own: one all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass, counts_of, elements_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks


class Joined(NamedTuple):
    """The batch of all ranks.

    Attributes:
        batch: losses, labels and counts of all samples, in the order of the ranks; no graph.
        length: the factor on ``sum_i w_i g_i`` that keeps the length of the gradient that one
            process would have on this batch, the factors on the losses included.
    """

    batch: PerSampleLosses
    length: float


def join(passes: Sequence[Pass], ranks: Ranks, most_passes: int = 1) -> Joined:
    """Gather the losses of all ranks, and find what one process would make of their reduction.

    A sum over a batch is a sum over shards. A mean divides by the number of elements, or by the
    class weights in it: both are sums over shards too, and the quotient is taken once they are
    complete. So shards need not be of equal size.

    Args:
        passes: the batches that this rank weighs together.
        ranks: who takes part.
        most_passes: how many passes any rank may have.

    Raises:
        RuntimeError: losses with different factors on different ranks, on all of them alike.
    """
    labelled = all(batch.labels is not None for batch, _ in passes)
    counted = any(batch.counts is not None for batch, _ in passes)
    header: list[float] = [labelled, counted, len(passes)]
    for batch, factor in passes:
        elements = elements_of(batch)
        scale = float(batch.scale)
        header += [elements, elements / scale if elements else 0.0, float(factor)]
    header += [0.0] * (3 * (most_passes - len(passes)))

    headers, rows = ranks.gather_rows(header, _rows(passes))
    some = passes[0].batch
    losses, labels, counts = rows.unbind(1)
    batch = PerSampleLosses(
        losses.to(some.losses.dtype),
        some.value,
        1.0,
        labels.long() if all(labelled for labelled, *_ in headers) else None,
        counts.round().long() if any(counted for _, counted, *_ in headers) else None,
    )
    return Joined(batch, _length(headers, some.summed))


def _rows(passes: Sequence[Pass]) -> Tensor:
    """Loss, label and number of elements of every sample: float64 holds them all exactly."""
    rows = []
    for batch, _ in passes:
        losses = batch.losses.detach().double()
        labels = torch.zeros_like(losses) if batch.labels is None else batch.labels.double()
        rows.append(torch.stack([losses, labels.to(losses.device), counts_of(batch).double()], 1))
    return torch.cat(rows)


def _length(headers: Sequence[Sequence[float]], summed: bool) -> float:
    length = 0.0
    number = max(int(passes) for _, _, passes, *_ in headers)
    for j in range(number):
        told = [h[3 + 3 * j : 6 + 3 * j] for h in headers if h[2] > j]
        factors = [factor for _, _, factor in told]
        if any(abs(f - factors[0]) > 1e-5 * abs(factors[0]) for f in factors):
            raise RuntimeError(
                f"the losses of the processes carry different factors, {factors}: the gradient of "
                "the batch of all processes has one. Leave out what makes up for shards of "
                "unequal size (it is accounted for), or use IRWOptimizer(..., worst_off='local')"
            )
        elements = sum(e for e, _, _ in told)
        divisor = sum(d for _, d, _ in told)
        scale = elements if summed else elements / divisor if divisor else 1.0
        length += factors[0] * scale
    return length
