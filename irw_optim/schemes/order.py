"""Are the batches in the order asked for, and the same each time?

A ``collate_fn`` may sort, replace samples, or shuffle; weights would go to others. A batch that
stays the same in another order shows it without a model. Else the losses do, and their derivatives
along a direction: of a batch drawn at random, and of every batch with a loss that was another one
elsewhere.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from irw_optim.gradients.protocol import Direction
from irw_optim.restored import randomness_restored

from .batch_losses import in_full_precision, warn_once

if TYPE_CHECKING:
    from .dataset_gradients import DatasetGradients

Collate = Callable[[list[Any]], Any]

Arrangement = tuple[Sequence[int], int]
"""An order of samples, and a seed."""

REMEDY = (
    "make it keep the order (sort, filter and repeat samples in a batch_sampler or data set), or "
    "say it: give a loader over irw_optim.schemes.IndexedDataset(dataset), whose collate_fn takes "
    "(index, sample) pairs and returns (indices, batch)"
)

_OF_THE_LARGEST = {torch.float64: 1e-8, torch.float32: 1e-4, None: 3e-2}
"""Tolerances (None: low precision) for the same samples in a batch of the same size."""

_OF_THE_MEAN_LOSS = {torch.float64: 1e-6, torch.float32: 1e-2, None: 0.1}
"""Far above what kernels for another batch size round differently."""


class RefusedError(Exception):
    """Stands for a batch that ``collate_fn`` would not make."""


def rearranged(
    collate_fn: Collate, arrangements: Sequence[Arrangement], samples: Sequence[Any]
) -> list[Any]:
    """A batch of the samples for each arrangement."""
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
    try:
        return copy.deepcopy(sample)  # they may be changed in place
    except Exception:  # what cannot be copied is taken as it is
        return sample


def refuse_sorting(collate_fn: Collate, samples: Sequence[Any]) -> None:
    """Raise a ValueError for a batch that stays the same in another order."""
    straight = list(range(len(samples)))
    # Most sorts keep the order of ties: two neighbours tell whose it is.
    neighbours = straight[: -1 : max(1, len(samples) // 4)]
    others = [straight[::-1], *(_exchanged(straight, i, i + 1) for i in neighbours)]

    def differ(order: list[int]) -> bool:
        """Whether what changes places differs."""
        moved = [([place], 0) for k, i in enumerate(order) if i != k for place in (i, k)]
        alone = rearranged(collate_fn, moved, samples)
        return not all(map(_same, alone[::2], alone[1::2]))

    with randomness_restored():
        first, *batches = rearranged(collate_fn, [(o, 0) for o in (straight, *others)], samples)
        pairs = zip(others, batches, strict=True)
        if any(_same(first, batch) and differ(order) for order, batch in pairs):
            raise ValueError(
                f"collate_fn={_name_of(collate_fn)} puts the samples of a batch in an order of its "
                f"own: {REMEDY}"
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two batches are seen to be equal."""
    arrays: tuple[Any, ...] = (Tensor, np.ndarray)
    if any(isinstance(one, kind) and isinstance(other, kind) for kind in arrays):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one is other or one == other)
    except Exception:  # it says nothing
        return False


def _name_of(collate_fn: Any) -> str:
    return getattr(collate_fn, "__qualname__", type(collate_fn).__name__)


def _exchanged(order: list[int], i: int, j: int) -> list[int]:
    other = list(order)
    other[i], other[j] = other[j], other[i]
    return other


def batches_to_check(rows: DatasetGradients, losses: Tensor, seed: int) -> list[Tensor]:
    """Dataset indices whose order to look at: a drawn batch, or all where all losses are equal."""
    if losses.max() - losses.min() <= 1e-3 * losses.mean().abs():
        positions, sizes = rows.interleaved()
        return [rows.samples[some] for some in positions.split(sizes)]
    number = max(rows.reader.batch_size, rows.reader.loader.batch_size or 1)
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(rows.batch_size, generator=generator, device="cpu")
    # The data set's order may be the only one that is taken.
    return [drawn[:number].sort().values]


def check_order(rows: DatasetGradients, asked: Tensor, parameters: Sequence[Tensor] | None) -> None:
    """Raise a ValueError unless ``asked``, dataset indices, give the same in other orders."""
    number = len(asked)
    if number < 2:
        return
    straight = list(range(number))
    pairs = sorted({(0, number - 1), (0, number // 2)})
    arrangements: list[Arrangement] = [(straight, 0), (straight[::-1], 0), (straight, 1)]
    arrangements += [(_exchanged(straight, *pair), 0) for pair in pairs]
    tables = _tables(rows, asked, arrangements, parameters)

    def alike(one: Tensor, other: Tensor) -> bool:
        tolerance = _tolerance(_OF_THE_LARGEST, first, in_full_precision(rows.losses_of.model))
        scale = first.nan_to_num().abs().amax(0)
        return bool(((one - other).nan_to_num().abs() <= tolerance * scale).all())

    first = next(tables)
    try:
        reversed_ = next(tables)
    except Exception:  # what takes one order only makes none of its own
        return
    if alike(first, reversed_):
        return
    name = _name_of(rows.reader.loader.collate_fn)
    if alike(first, next(tables)):
        raise ValueError(
            f"collate_fn={name} (or forward=) gives the samples of a batch in an order of its own, "
            "or others: the losses of the same samples differ when it is handed them the other way "
            f"round, and weights would go to the wrong samples; {REMEDY}"
        )
    # Some pair that changes places has to change its own rows alone.
    shown = False
    for places, table in zip(pairs, tables, strict=True):
        pair = torch.tensor(places, device="cpu")
        back, others = pair.flip(0), [i for i in straight if i not in places]
        if not alike(first[pair], first[back]):
            stayed = alike(first[pair], table[back])
            shown = not stayed and alike(first[others], table[others])
            if not shown:
                break
    if not shown:
        raise ValueError(
            f"collate_fn={name} (or forward=) draws at random, and the order of its samples cannot "
            f"be verified; {REMEDY}"
        )


def _tables(
    rows: DatasetGradients,
    asked: Tensor,
    arrangements: Sequence[Arrangement],
    parameters: Sequence[Tensor] | None,
) -> Iterator[Tensor]:
    """What `probe` tells, for each arrangement, in the order of ``asked``."""
    direction: Direction | None = None
    if parameters is not None:
        generator = torch.Generator("cpu").manual_seed(0)
        direction = {
            p: torch.randn(p.shape, dtype=p.dtype, generator=generator, device="cpu").to(p.device)
            for p in parameters
        }
    batches = rows.reader.rearranged(asked, arrangements)
    for (places, batch), (_, seed) in zip(batches, arrangements, strict=True):
        torch.manual_seed(seed)  # a model may draw in eval mode too
        found = rows.probe(asked[places], batch, direction)
        yield torch.empty_like(found).index_copy(0, places.to(found.device), found)


def _tolerance(table: Mapping[Any, float], values: Tensor, full_precision: bool) -> float:
    return table.get(values.dtype if full_precision else None, table[None])


@dataclass(eq=False)
class LossConsistency:
    """The losses of N samples in all batches."""

    size: int
    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def note(self, samples: Tensor, losses: Tensor) -> None:
        """Take the losses (b,) of dataset indices (b,)."""
        self.batches.append((samples, losses.detach()))

    def differing_batches(self, full_precision: bool) -> list[list[int]]:
        """Those with the sample whose losses differ most, if beyond rounding."""
        difference, sample, mean = self._most_different()
        tolerance = _tolerance(_OF_THE_MEAN_LOSS, mean, full_precision)
        if not float(difference) > tolerance * abs(float(mean)):
            return []
        batches = [samples.tolist() for samples, _ in self.batches]
        return [batch for batch in batches if int(sample) in batch]

    def warn(self, model: nn.Module) -> None:
        """Say, once for a model, what that means."""
        difference, _, mean = self._most_different()
        warn_once(
            model,
            f"a sample's loss differs by up to {float(difference):.2g} (the mean loss is "
            f"{float(mean):.2g}) from one batch to another, and the weights with it: the forward "
            "mixes samples or pads them without a mask, or data set, collate_fn or model draw at "
            "random. Use a model in which each sample stands for itself, without random "
            "augmentation",
        )

    def _most_different(self) -> tuple[Tensor, Tensor, Tensor]:
        """The largest difference, whose it is, and the mean loss, all 0-dim."""
        losses = torch.cat([losses for _, losses in self.batches]).cpu()
        samples = torch.cat([samples for samples, _ in self.batches])
        nothing = losses.new_full((self.size,), -torch.inf)
        most = nothing.scatter_reduce(0, samples, losses, "amax")
        least = nothing.neg().scatter_reduce(0, samples, losses, "amin")
        difference = (most - least).nan_to_num(0.0, neginf=0.0)  # of some nothing is known
        return *difference.max(0), least[least.isfinite()].mean()
