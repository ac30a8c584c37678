"""G for a whole data set, (N, P): never built, and never more than one batch of it at a time.

The global scheme is the local one on a single batch of all N samples. So all it takes is the three
products for such a batch; `combine` and `dot` are sums and lists over batches that are run again
for every product, in O(P) memory::

    G^T w = sum over batches G_b^T w_b        only batches of samples with a weight are run
    G v   = [G_b v for every batch b]

The third product, N x N, is not on offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass, as_one, elements_of, some_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.backward_passes import backward_to
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.protocol import Direction, PerSampleGradients
from irw_optim.schemes import forward_mode
from irw_optim.schemes.consistency import LossConsistency
from irw_optim.schemes.forward_mode import in_full_precision, jvp
from irw_optim.schemes.reading import DatasetReader

DIFFERENTIATES = "the losses are derivatives themselves"
"""What an `Engine` remembers of a model whose losses need a graph, as a physics-informed one's."""

INTERLEAVED = 8
"""Batches that neighbours in the data set are dealt out to, for the losses: reading stays local."""


class DatasetGradients:
    """The per-sample gradients of some or all samples of a data set.

    Args:
        reader: reads the samples.
        samples: (n,) int64 on the CPU, the dataset indices that are the rows, in this order.
        losses_of: the per-sample losses of a batch as the reader yields it, with their graph.
        engine: turns losses into the products of one batch.
        scored: which parameters are the columns.
        advance: is told of every batch, by its number of samples, for a progress bar.
    """

    def __init__(
        self,
        reader: DatasetReader,
        samples: Tensor,
        losses_of: Callable[[Any], PerSampleLosses],
        engine: Engine,
        scored: Callable[[Tensor], bool],
        advance: Callable[[int], None],
    ) -> None:
        self.reader = reader
        self.samples = samples
        self.losses_of = losses_of
        self.engine = engine
        self.scored = scored
        self.advance = advance
        self.batch_size = len(samples)
        self._combined: tuple[Tensor, Direction] | None = None  # w and G^T w, for `dot` to check
        self._sizes = 0.0, 0.0  # known once the engine has seen a batch
        self.consistency = LossConsistency(reader.size)

    def of(self, rows: Tensor) -> DatasetGradients:
        """These rows alone: ``rows`` is a bool mask (n,)."""
        some = copy(self)
        some.samples = self.samples[rows.cpu()]
        some.batch_size = len(some.samples)
        some._combined = None
        return some

    def losses(self) -> PerSampleLosses:
        """The losses of all rows, (n,), with labels and counts, as one batch has them."""
        batches, order = [], []
        for some, indices, batch in self._read(*self.interleaved()):
            batches.append(self._losses_alone(indices, batch))
            order.append(some)
        torch.clear_autocast_cache()  # casts of parameters that no graph leads to
        batch = as_one([Pass(part._replace(losses=widened(part.losses)), 1.0) for part in batches])
        batch = batch._replace(elements=sum(elements_of(part) for part in batches))
        return some_of(batch, torch.cat(order).argsort().to(batch.losses.device))

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w, over the samples that have a weight."""
        used = weights.nonzero().squeeze(1).cpu()
        # Summed up in the precision of the products: in float64, weights of 32,000 samples came
        # no closer to those computed in float64 throughout (1e-7 of the largest, for any batch).
        total: dict[Tensor, Tensor] = {}
        # It is what an ordinary backward pass computes, and no engine in less. Only of numbers of
        # low precision do the engines make more.
        by = self._by_backward if in_full_precision(self.engine) else self._by_engine
        for products in by(used, weights):
            for parameter, part in products.items():
                total[parameter] = total[parameter] + part if parameter in total else part
        self._combined = weights, total
        return total

    def _by_engine(self, positions: Tensor, weights: Tensor) -> Iterator[Direction]:
        for some, rows in self.blocks(positions):
            yield rows.combine(weights[some.to(weights.device)])

    def _by_backward(self, positions: Tensor, weights: Tensor) -> Iterator[Direction]:
        for some, indices, batch in self._read(positions):
            with self._captured(indices, batch) as captured:
                leaves = [p for p in captured.leaves if self.scored(p)]
                chosen = weights[some.to(weights.device)]
                gradients = backward_to(leaves, captured.losses, chosen, leaves, retain_graph=False)
            found = zip(leaves, gradients, strict=True)
            yield {p: g.to_dense() for p, g in found if g is not None}

    def dot(self, direction: Direction) -> Tensor:
        """G v, (n,): in forward mode where that is quicker and right, else by the engine."""
        if forward_mode.pays_off(self.engine, self._sizes, self.reader.batch_size):
            try:
                return self._dot_in_forward_mode(direction)
            except RuntimeError as error:
                forward_mode.give_up(self.engine, error)
        everybody = torch.arange(self.batch_size, device="cpu")
        return _in_order((some, rows.dot(direction)) for some, rows in self.blocks(everybody))

    def _dot_in_forward_mode(self, direction: Direction) -> Tensor:
        size = self.reader.batch_size
        # One batch, which the engine takes as well, and then two at once: no graph holds anything.
        first, others = self.samples[:size], self.samples[size:]
        sizes = [len(first), *map(len, others.split(2 * size) if len(others) else ())]
        scores = _in_order(self._parts_in_forward_mode(direction, sizes))
        if self._combined is not None:
            forward_mode.check_sum(scores, direction, *self._combined)
        return scores

    def _parts_in_forward_mode(
        self, direction: Direction, sizes: list[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        model, first = self.engine.model, True
        assert model is not None
        for some, indices, batch in self._read(torch.arange(self.batch_size, device="cpu"), sizes):
            scores = jvp(model, partial(self._losses_of, indices), batch, direction)
            if first:
                with self._gradients(indices, batch) as rows:
                    forward_mode.check_equal(scores, rows.dot(direction))
            first = False
            yield some, scores

    def gram(self) -> Tensor:
        """Not on offer: N x N numbers."""
        raise RuntimeError(
            f"G G^T of a data set has {self.batch_size}^2 entries: a rule of the global scheme may "
            "use combine and dot, and outlier filters work in blocks"
        )

    def blocks(
        self, positions: Tensor, sizes: list[int] | None = None
    ) -> Iterator[tuple[Tensor, PerSampleGradients]]:
        """Yield pieces of ``positions`` (rows of G) with the gradients of each."""
        for some, indices, batch in self._read(positions, sizes):
            with self._gradients(indices, batch) as rows:
                yield some, rows

    def _read(
        self, positions: Tensor, sizes: list[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yield pieces of ``positions`` with the dataset indices and the batch of each."""
        for places, batch in self.reader.batches(self.samples[positions], sizes):
            some = positions[places]
            yield some, self.samples[some], batch
            self.advance(len(some))

    @contextmanager
    def _gradients(self, indices: Tensor, batch: Any) -> Iterator[PerSampleGradients]:
        with self._captured(indices, batch) as captured:
            device = captured.losses.device
            with torch.autocast(device_type=device.type, enabled=False):
                captured.start(torch.ones((), device=device), keep_graph=False)
                yield captured.rows(self.scored)

    @contextmanager
    def _captured(self, indices: Tensor, batch: Any) -> Iterator[LossGradients]:
        """The losses of a batch with what leads to them, until the end of the block."""
        with torch.enable_grad():
            losses = self._losses_of(indices, batch).losses
        captured = LossGradients(self.engine, losses)
        self._sizes = forward_mode.sizes_of(captured.graph, max(1, len(indices)))
        try:
            yield captured
        finally:
            captured.close()

    def _losses_of(self, indices: Tensor, batch: Any) -> PerSampleLosses:
        part = self.losses_of(batch)
        if len(part.losses) != len(indices):
            raise ValueError(
                f"{len(indices)} samples of the data set gave {len(part.losses)} losses: expected "
                "a collate_fn that keeps every sample, and a criterion with one loss for each"
            )
        self.consistency.note(indices, part.losses)
        return part

    def probe(self, indices: Tensor, batch: Any, direction: Direction | None) -> Tensor:
        """What tells samples apart: the losses, and G v where a direction is given, (b, 1 or 2)."""
        columns = [widened(self._losses_alone(indices, batch).losses)]
        if direction is not None:
            with self._gradients(indices, batch) as rows:
                columns.append(rows.dot(direction).to(columns[0].dtype))
        return torch.stack(columns, 1)

    def interleaved(self) -> tuple[Tensor, list[int]]:
        """All rows in batches for `losses`, and their sizes: two at once, as no graph is held.

        Neighbours in the data set, which meet in every other pass, are dealt out to several.
        """
        size = 2 * self.reader.batch_size
        batches = []
        for piece in torch.arange(self.batch_size, device="cpu").split(INTERLEAVED * size):
            number = -(-len(piece) // size)
            batches += [piece[first::number] for first in range(number)]
        return torch.cat([torch.arange(0, device="cpu"), *batches]), [
            len(batch) for batch in batches
        ]

    def read_in_other_batches(self) -> None:
        """Look at the samples in other batches than `losses` has seen them in."""
        in_one_batch = self.batch_size <= 2 * self.reader.batch_size
        some = self.samples[1::2] if in_one_batch else self.samples
        for places, batch in self.reader.batches(some):
            self._losses_alone(some[places], batch)

    def _losses_alone(self, indices: Tensor, batch: Any) -> PerSampleLosses:
        """Without their graph, and without making one, unless the losses are derivatives."""
        if not self.engine.known.get(DIFFERENTIATES):
            try:
                with torch.no_grad():
                    return self._losses_of(indices, batch)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.engine.known[DIFFERENTIATES] = True
        with torch.enable_grad():
            part = self._losses_of(indices, batch)
        return part._replace(losses=part.losses.detach())


def _in_order(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The values of batches, each with the places of its samples, by place."""
    places, values = zip(*parts, strict=True)
    joined = torch.cat(values)
    return joined[torch.cat(places).argsort().to(joined.device)]


def check_finite(values: Tensor, what: str, samples: Tensor) -> None:
    """Raise a FloatingPointError that names the samples whose value is not finite."""
    broken = (~values.isfinite()).nonzero().flatten().tolist()
    if broken:
        named = ", ".join(str(int(samples[i])) for i in broken[:10])
        more = ", ..." if len(broken) > 10 else ""
        raise FloatingPointError(
            f"the {what} of {len(broken)} samples are not finite (dataset indices {named}{more}): "
            "no weights were made; look at these samples, or at the model's parameters"
        )
