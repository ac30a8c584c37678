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

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from irw_optim.gradients.protocol import Direction
from irw_optim.schemes.collating import REMEDY, exchanged, name_of
from irw_optim.schemes.dataset_gradients import DatasetGradients
from irw_optim.schemes.forward_mode import in_full_precision

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Of the largest number in a column: the same samples in a batch of the same size."""

_LOW_PRECISION = 3e-2


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
    drawn = torch.randperm(
        rows.batch_size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )
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
    arrangements += [(exchanged(straight, *pair), 0) for pair in pairs]
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
    name = name_of(reader.loader.collate_fn)
    again = next_table()
    if alike(first, again):
        raise ValueError(
            f"collate_fn={name} (or forward=) gives the samples of a batch in an order of its own, "
            "or others: the losses of the same samples differ when it is handed them the other way "
            f"round, and weights would go to the wrong samples; {REMEDY}"
        )
    tables = (next_table() for _ in pairs)
    if not _only_pairs_exchange(first, zip(pairs, tables, strict=True), alike):
        raise ValueError(
            f"collate_fn={name} (or forward=) draws at random, and the order of its samples cannot "
            f"be verified: what a sample gives depends on more than its place; {REMEDY}"
        )


def _only_pairs_exchange(
    first: Tensor,
    exchanges: Iterable[tuple[tuple[int, int], Tensor]],
    alike: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Whether two samples that change places, with the same draws, change their rows and no others.

    False where no pair has rows that differ, which shows nothing.
    """
    shown = False
    for (i, j), table in exchanges:
        pair = torch.tensor([i, j], device="cpu")
        others = torch.ones(len(first), dtype=torch.bool, device="cpu").index_fill(0, pair, False)
        if not alike(first[pair], first[pair.flip(0)]):
            stayed = alike(first[pair], table[pair.flip(0)])
            if stayed or not alike(first[others], table[others]):
                return False
            shown = True
    return shown


def _random_direction(parameters: Sequence[Tensor]) -> Direction:
    generator = torch.Generator("cpu").manual_seed(0)
    return {
        p: torch.randn(p.shape, dtype=p.dtype, generator=generator, device="cpu").to(p.device)
        for p in parameters
    }
