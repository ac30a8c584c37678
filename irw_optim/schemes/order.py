"""Do batches hold the samples in the order in which they were asked for?

A ``collate_fn`` may sort by length, fill gaps with other samples, or shuffle; every weight would
then go to another sample. A batch that is the same in whatever order its samples come shows it
without a model. Else the losses do, and what they change by along a direction v, (G v)_i::

    losses(collate([a, b, c])) == losses(collate([c, b, a])).flip(0)

A batch drawn at random is asked, and every batch with a loss that was another one elsewhere.
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
from irw_optim.restored import randomness_restored
from irw_optim.schemes.forward_mode import in_full_precision

if TYPE_CHECKING:
    from irw_optim.schemes.dataset_gradients import DatasetGradients

Collate = Callable[[list[Any]], Any]

Arrangement = tuple[Sequence[int], int]
"""An order of samples, and the seed of what is drawn as they are put together."""

REMEDY = (
    "make it keep the order (sort, filter and repeat samples in a batch_sampler, or in the data "
    "set), or let it say what it does: give a loader over irw_optim.schemes.IndexedDataset(dataset)"
    ", whose collate_fn takes (index, sample) pairs and returns (indices, batch)"
)

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Of the largest number in a column: the same samples in a batch of the same size."""

_LOW_PRECISION = 3e-2


class RefusedError(Exception):
    """Stands for the batch of an order that a ``collate_fn`` would not take."""


def rearranged(
    collate_fn: Collate, arrangements: Sequence[Arrangement], samples: Sequence[Any]
) -> list[Any]:
    """Make of samples one batch for each arrangement."""
    batches: list[Any] = []
    for order, seed in arrangements:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach into devices
        random.seed(seed)
        np.random.seed(seed)
        try:
            batches.append(collate_fn([_copied(samples[i]) for i in order]))
        except Exception as error:
            if not batches:  # the order of the data set
                raise
            batches.append(RefusedError(str(error)))
    return batches


def _copied(sample: Any) -> Any:
    """A ``collate_fn`` may change its samples in place."""
    try:
        return copy.deepcopy(sample)
    except Exception:  # what cannot be copied is taken as it is
        return sample


def refuse_sorting(collate_fn: Collate, samples: Sequence[Any]) -> None:
    """Raise a ValueError for a batch that is the same in whatever order its samples come."""
    straight = list(range(len(samples)))
    # Ties keep their order in most sorts: two neighbours say whether it is theirs or ours.
    neighbours = straight[: -1 : max(1, len(samples) // 4)]
    others = [straight[::-1], *(_exchanged(straight, i, i + 1) for i in neighbours)]
    with randomness_restored():
        batches = rearranged(collate_fn, [(o, 0) for o in (straight, *others)], samples)
        pairs = zip(others, batches[1:], strict=True)
        suspects = [order for order, batch in pairs if _same(batches[0], batch)]
        sorts = any(_differ(collate_fn, samples, order) for order in suspects)
    if sorts:
        raise ValueError(
            f"collate_fn={_name_of(collate_fn)} puts the samples of a batch in an order of its "
            f"own, and weights would go to the wrong ones: {REMEDY}"
        )


def _differ(collate_fn: Collate, samples: Sequence[Any], order: Sequence[int]) -> bool:
    """Whether an order changes anything: not where what it exchanges makes the same batch alone."""
    moved = [(i, k) for k, i in enumerate(order) if i != k]
    alone = rearranged(collate_fn, [([place], 0) for pair in moved for place in pair], samples)
    return not all(map(_same, alone[::2], alone[1::2]))


def _same(one: Any, other: Any) -> bool:
    """Whether two batches are seen to be equal; False where that cannot be seen."""
    arrays: tuple[Any, ...] = (Tensor, np.ndarray)
    if any(isinstance(one, kind) and isinstance(other, kind) for kind in arrays):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one is other or one == other)
    except Exception:  # of whatever kind, it says nothing
        return False


def _name_of(collate_fn: Any) -> str:
    return getattr(collate_fn, "__qualname__", type(collate_fn).__name__)


def _exchanged(order: list[int], i: int, j: int) -> list[int]:
    other = list(order)
    other[i], other[j] = other[j], other[i]
    return other


def batches_to_check(rows: DatasetGradients, losses: Tensor, seed: int) -> list[Tensor]:
    """Samples whose order is to be looked at, as dataset indices: one drawn batch, as a rule.

    Where all ``losses``, (N,), are equal, later ones would not show another order: every batch.
    """
    if losses.max() - losses.min() <= 1e-3 * losses.mean().abs():
        positions, sizes = rows.interleaved()
        return [rows.samples[some] for some in positions.split(sizes)]
    number = max(rows.reader.batch_size, rows.reader.loader.batch_size or 1)
    drawn = torch.randperm(
        rows.batch_size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
    # In the order of the data set, which may be the only one that is taken.
    return [drawn[:number].sort().values]


def check_order(rows: DatasetGradients, asked: Tensor, parameters: Sequence[Tensor] | None) -> None:
    """Raise a ValueError unless these samples (dataset indices) give the same in other orders.

    Where all losses are equal, their derivatives along a random direction in these parameters
    are not.
    """
    reader, number = rows.reader, len(asked)
    if number < 2:
        return
    straight = list(range(number))
    pairs = sorted({(0, number - 1), (0, number // 2)})
    arrangements: list[Arrangement] = [(straight, 0), (straight[::-1], 0), (straight, 1)]
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

    def only_exchanges() -> bool:
        """Whether samples that change places change their own rows alone, as some pair shows."""
        shown = False
        for places in pairs:
            pair, table = torch.tensor(places, device="cpu"), next_table()
            back, others = pair.flip(0), torch.ones(number, dtype=torch.bool, device="cpu")
            others[pair] = False
            if not alike(first[pair], first[back]):
                stayed = alike(first[pair], table[back])
                if stayed or not alike(first[others], table[others]):
                    return False
                shown = True
        return shown

    first = next_table()
    try:
        reversed_ = next_table()
    except Exception:  # what takes no order but the one it is given makes none of its own
        return
    if alike(first, reversed_):
        return
    name = _name_of(reader.loader.collate_fn)
    if alike(first, next_table()):
        raise ValueError(
            f"collate_fn={name} (or forward=) gives the samples of a batch in an order of its own, "
            "or others: the losses of the same samples differ when it is handed them the other way "
            f"round, and weights would go to the wrong samples; {REMEDY}"
        )
    if not only_exchanges():
        raise ValueError(
            f"collate_fn={name} (or forward=) draws at random, and the order of its samples cannot "
            f"be verified: what a sample gives depends on more than its place; {REMEDY}"
        )


def _random_direction(parameters: Sequence[Tensor]) -> Direction:
    generator = torch.Generator("cpu").manual_seed(0)
    return {
        p: torch.randn(p.shape, dtype=p.dtype, generator=generator, device="cpu").to(p.device)
        for p in parameters
    }
