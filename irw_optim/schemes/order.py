"""Do batches hold the samples in the order in which they were asked for?

A ``collate_fn`` may sort by length, fill gaps with other samples, or shuffle; every weight would
then go to another sample. The batch does not show it, for its layout is the user's own. Its losses
do, and what they change by along a direction v, (G v)_i: put together in another order, the same
samples must have the same of both::

    losses(collate([a, b, c])) == losses(collate([c, b, a])).flip(0)

Only a few samples are asked, drawn at random from the whole data set.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from irw_optim.gradients.protocol import Direction
from irw_optim.schemes.forward_mode import in_full_precision

if TYPE_CHECKING:
    from irw_optim.schemes.dataset_gradients import DatasetGradients

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Of the largest number in a column: the same samples in a batch of the same size."""

_LOW_PRECISION = 3e-2

_REMEDY = (
    "make it keep the order (sort, filter and repeat samples in a batch_sampler, or in the data "
    "set), or let it say what it does: give a loader over irw_optim.schemes.IndexedDataset(dataset)"
    ", whose collate_fn takes (index, sample) pairs and returns (indices, batch)"
)


def check_order(rows: DatasetGradients, parameters: Sequence[Tensor] | None, seed: int) -> None:
    """Compare what a few samples give, put together in other orders.

    Args:
        rows: of all samples.
        parameters: along a random direction of which the losses are differentiated as well: where
            all losses are equal, the derivatives are not; None for the losses alone.
        seed: which samples are asked.

    Raises:
        ValueError: another order gives other losses, or nothing that can be compared.
    """
    reader = rows.reader
    number = min(rows.batch_size, max(reader.batch_size, reader.loader.batch_size or 1))
    if number < 2:
        return
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randperm(rows.batch_size, generator=generator)[:number]
    straight = list(range(number))
    pairs = sorted({(0, number - 1), (0, number // 2)})
    arrangements = [(straight, 0), (straight[::-1], 0), (straight, 1)]
    arrangements += [(_exchanged(straight, *pair), 0) for pair in pairs]
    direction = None if parameters is None else _random_direction(parameters, generator)

    batches = zip(reader.rearranged(asked, arrangements), arrangements, strict=True)

    def alike(one: Tensor, other: Tensor) -> bool:
        tolerance = _LOW_PRECISION
        if in_full_precision(rows.engine):
            tolerance = _TOLERANCE[first.dtype]
        scale = first.nan_to_num().abs().amax(0)
        return bool(((one - other).nan_to_num().abs() <= tolerance * scale).all())

    def next_table() -> Tensor:
        """Rows by sample, in the order of ``asked``."""
        (places, batch), (_, draws) = next(batches)
        _seed_everything(draws)  # a model may draw in eval mode too
        found = rows.probe(asked[places], batch, direction)
        return torch.empty_like(found).index_copy(0, places.to(found.device), found)

    first, reversed_ = next_table(), next_table()
    if alike(first, reversed_):
        return
    name = getattr(
        reader.loader.collate_fn, "__qualname__", type(reader.loader.collate_fn).__name__
    )
    again = next_table()
    if alike(first, again):
        raise ValueError(
            f"collate_fn={name} (or forward=) gives the samples of a batch in an order of its own, "
            "or others: the losses of the same samples differ when it is handed them the other way "
            f"round, and weights would go to the wrong samples; {_REMEDY}"
        )
    # Drawn at random. With the same draws, two samples that change places change two rows.
    compared = 0
    for i, j in pairs:
        table, pair = next_table(), torch.tensor([i, j])
        others = torch.tensor([k for k in straight if k not in (i, j)], dtype=torch.int64)
        if not alike(first[pair], first[pair.flip(0)]):
            compared += 1
            stayed = alike(first[pair], table[pair.flip(0)])
            if stayed or not alike(first[others], table[others]):
                compared = 0
                break
    if not compared:
        raise ValueError(
            f"collate_fn={name} (or forward=) draws at random, and the order of its samples cannot "
            f"be verified: what a sample gives depends on more than its place; {_REMEDY}"
        )


class Rearranged:
    """Collates the same samples several times; a class, so that workers can have it.

    Args:
        collate_fn: makes a batch of a list of samples.
        arrangements: the order of the samples, and the seed of what is drawn, for each batch.

    >>> Rearranged(list, [([0, 1], 0), ([1, 0], 0)])(["a", "b"])
    [['a', 'b'], ['b', 'a']]
    """

    def __init__(
        self,
        collate_fn: Callable[[list[Any]], Any],
        arrangements: Sequence[tuple[Sequence[int], int]],
    ) -> None:
        self.collate_fn = collate_fn
        self.arrangements = arrangements

    def __call__(self, samples: list[Any]) -> list[Any]:
        """One batch for each arrangement."""
        batches = []
        for order, seed in self.arrangements:
            _seed_everything(seed)
            batches.append(self.collate_fn([_copied(samples[i]) for i in order]))
        return batches


def _copied(sample: Any) -> Any:
    """A ``collate_fn`` may change its samples in place."""
    try:
        return copy.deepcopy(sample)
    except Exception:  # what cannot be copied is taken as it is
        return sample


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _exchanged(order: list[int], i: int, j: int) -> list[int]:
    exchanged = list(order)
    exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
    return exchanged


def _random_direction(parameters: Sequence[Tensor], generator: torch.Generator) -> Direction:
    return {
        p: torch.randn(p.shape, dtype=p.dtype, generator=generator).to(p.device) for p in parameters
    }
