"""Do batches hold the samples in the order in which they were asked for?

A ``collate_fn`` may sort by length, fill gaps with other samples, or shuffle; every weight would
then go to another sample. The batch does not show it, for its layout is the user's own. Its losses
do, and what they change by along a direction v, (G v)_i: put together in another order, the same
samples must have the same of both::

    losses(collate([a, b, c])) == losses(collate([c, b, a])).flip(0)

A batch of samples is asked, drawn at random from the whole data set, and every batch in which a
sample's loss was another one than elsewhere (`irw_optim.schemes.consistency`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
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


def batches_to_check(rows: DatasetGradients, losses: Tensor, seed: int) -> list[Tensor]:
    """Samples whose order is to be looked at, as dataset indices: one batch, as a rule.

    Args:
        rows: of all samples.
        losses: theirs, (N,). Where they are all equal, those of a batch would not show later that
            its order was another one, and every batch is asked now.
        seed: of the draw.
    """
    if losses.max() - losses.min() <= 1e-3 * losses.mean().abs():
        positions, sizes = rows.interleaved()
        return [rows.samples[some] for some in positions.split(sizes)]
    number = max(rows.reader.batch_size, rows.reader.loader.batch_size or 1)
    drawn = torch.randperm(rows.batch_size, generator=torch.Generator().manual_seed(seed))
    # In the order of the data set, which may be the only one that is taken.
    return [drawn[:number].sort().values]


def check_order(rows: DatasetGradients, asked: Tensor, parameters: Sequence[Tensor] | None) -> None:
    """Compare what some samples give, put together in other orders.

    Args:
        rows: of all samples.
        asked: the dataset indices of some, each once.
        parameters: along a random direction of which the losses are differentiated as well: where
            all losses are equal, the derivatives are not; None for the losses alone.

    Raises:
        ValueError: another order gives other losses, or nothing that can be compared.
    """
    reader, number = rows.reader, len(asked)
    if number < 2:
        return
    straight = list(range(number))
    pairs = sorted({(0, number - 1), (0, number // 2)})
    arrangements = [(straight, 0), (straight[::-1], 0), (straight, 1)]
    arrangements += [(_exchanged(straight, *pair), 0) for pair in pairs]
    direction = None if parameters is None else _random_direction(parameters)

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
        torch.manual_seed(draws)  # a model may draw in eval mode too
        found = rows.probe(asked[places], batch, direction)
        return torch.empty_like(found).index_copy(0, places.to(found.device), found)

    first = next_table()
    try:
        reversed_ = next_table()
    except Exception:  # what takes no order but the one it is given makes none of its own
        return
    if alike(first, reversed_):
        return
    name = _name(reader.loader.collate_fn)
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
    others = [straight[::-1], *(_exchanged(straight, i, i + 1) for i in neighbours)]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(()):
            batches = Rearranged(collate_fn, [(o, 0) for o in (straight, *others)])(list(samples))
            pairs = zip(others, batches[1:], strict=True)
            suspects = [order for order, batch in pairs if _same(batches[0], batch)]
            sorts = any(_differ(collate_fn, samples, order) for order in suspects)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if sorts:
        raise ValueError(
            f"collate_fn={_name(collate_fn)} puts the samples of a batch in an order of its own, "
            f"and weights would go to the wrong ones: {_REMEDY}"
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


def _name(collate_fn: Any) -> str:
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


def _exchanged(order: list[int], i: int, j: int) -> list[int]:
    exchanged = list(order)
    exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
    return exchanged


def _random_direction(parameters: Sequence[Tensor]) -> Direction:
    generator = torch.Generator().manual_seed(0)
    return {
        p: torch.randn(p.shape, dtype=p.dtype, generator=generator).to(p.device) for p in parameters
    }
