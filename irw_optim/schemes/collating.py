"""What a ``collate_fn`` makes of the same samples in several orders.

One that sorts, by length say, puts the samples of a batch in an order of its own, and every weight
would go to another sample. Where the batch is the same in whatever order its samples come, that
shows without a model; `irw_optim.schemes.order` asks the losses.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irw_optim.restored import randomness_restored

REMEDY = (
    "make it keep the order (sort, filter and repeat samples in a batch_sampler, or in the data "
    "set), or let it say what it does: give a loader over irw_optim.schemes.IndexedDataset(dataset)"
    ", whose collate_fn takes (index, sample) pairs and returns (indices, batch)"
)


def refuse_sorting(collate_fn: Callable[[list[Any]], Any], samples: Sequence[Any]) -> None:
    """Raise for a batch that is the same in whatever order its samples come.

    All that can be seen without a model, whatever the layout of the batch is. Random states are as
    before afterwards.

    Raises:
        ValueError: that.

    >>> refuse_sorting(list, [2, 1, 1])
    >>> refuse_sorting(sorted, [2, 1, 1])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: collate_fn=sorted puts the samples of a batch in an order of its own, ...
    """
    straight = list(range(len(samples)))
    # Ties keep their order in most sorts: two neighbours say whether it is theirs or ours.
    neighbours = straight[: -1 : max(1, len(samples) // 4)]
    others = [straight[::-1], *(exchanged(straight, i, i + 1) for i in neighbours)]
    with randomness_restored():
        batches = Rearranged(collate_fn, [(o, 0) for o in (straight, *others)])(list(samples))
        pairs = zip(others, batches[1:], strict=True)
        suspects = [order for order, batch in pairs if _same(batches[0], batch)]
        sorts = any(_differ(collate_fn, samples, order) for order in suspects)
    if sorts:
        raise ValueError(
            f"collate_fn={name_of(collate_fn)} puts the samples of a batch in an order of its own, "
            f"and weights would go to the wrong ones: {REMEDY}"
        )


def _differ(
    collate_fn: Callable[[list[Any]], Any], samples: Sequence[Any], order: Sequence[int]
) -> bool:
    """Whether an order changes anything: not where what it exchanges makes the same batch alone."""
    moved = [(i, k) for k, i in enumerate(order) if i != k]
    ways = [([place], 0) for pair in moved for place in pair]
    alone = Rearranged(collate_fn, ways)(list(samples))
    return not all(map(_same, alone[::2], alone[1::2]))


def _same(one: Any, other: Any) -> bool:
    """Whether two batches are seen to be equal; False where that cannot be seen."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.all(one == other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one is other or one == other)
    except Exception:  # of whatever kind, it says nothing
        return False


def name_of(collate_fn: Any) -> str:
    """What messages call it."""
    return getattr(collate_fn, "__qualname__", type(collate_fn).__name__)


class RefusedError(Exception):
    """Stands for the batch of an order that a ``collate_fn`` would not take."""


class Rearranged:
    """Collates the same samples several times; a class, so that workers can have it.

    An order that is refused gives a `RefusedError`, unless it is the first one.

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
        batches: list[Any] = []
        for order, seed in self.arrangements:
            _seed(seed)
            try:
                batches.append(self.collate_fn([_copied(samples[i]) for i in order]))
            except Exception as error:
                if not batches:
                    raise
                batches.append(RefusedError(str(error)))
        return batches


def _copied(sample: Any) -> Any:
    """A ``collate_fn`` may change its samples in place."""
    try:
        return copy.deepcopy(sample)
    except Exception:  # what cannot be copied is taken as it is
        return sample


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach into devices
    random.seed(seed)
    np.random.seed(seed)


def exchanged(order: list[int], i: int, j: int) -> list[int]:
    """The order with two places exchanged."""
    other = list(order)
    other[i], other[j] = other[j], other[i]
    return other
