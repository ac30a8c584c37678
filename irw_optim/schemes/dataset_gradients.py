"""G for a whole data set, (N, P), of which products read one batch after the other.

G^T w sums up G_b^T w_b over batches of samples with a weight, G v lines up G_b v; no gram.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irw_optim.backward.weighted_loss import Pass, as_one, elements_of, some_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.weigher import join
from irw_optim.gradients.backward_passes import backward_to
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.nodes import shape_of
from irw_optim.gradients.protocol import Direction, PerSampleGradients, widened

from .batch_losses import BatchLosses, in_full_precision
from .order import LossConsistency
from .reading import DatasetReader

logger = logging.getLogger("irw_optim")

DIFFERENTIATES, STAYS_BACK = "the losses are derivatives themselves", "nothing goes forwards"
"""What an `Engine` remembers of its model."""

SMALL = 2**23
"""So few numbers in a graph are no memory."""


@dataclass(eq=False)
class DatasetGradients:
    """G for the ``scored`` parameters; ``advance`` hears of numbers of samples read."""

    reader: DatasetReader
    losses_of: BatchLosses
    engine: Engine
    scored: Callable[[Tensor], bool]
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        self.samples = torch.arange(self.reader.size, device="cpu")  # the rows, as dataset indices
        self.consistency = LossConsistency(self.reader.size)
        self._numbers = math.inf  # in a sample's graph, once one was captured
        self._combined: tuple[Tensor, Direction] | None = None  # w and G^T w, for `dot` to check

    @property
    def batch_size(self) -> int:
        return len(self.samples)

    def _all(self) -> Tensor:
        return torch.arange(len(self.samples), device="cpu")

    def of(self, rows: Tensor) -> "DatasetGradients":
        """These rows alone, by a bool mask (n,) or positions."""
        some = copy(self)
        some.samples = self.samples[rows.cpu()]
        some._combined = None
        return some

    def losses(self) -> PerSampleLosses:
        """The losses of all rows, (n,), as of one batch."""
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
        # Summed up in float64 it came no closer, for 32,000 samples.
        total: dict[Tensor, Tensor] = {}
        # Engines are no quicker, but better in low precision.
        by_backward = in_full_precision(self.losses_of.model)
        for some, indices, batch in self._read(weights.nonzero().squeeze(1).cpu()):
            chosen = weights[some.to(weights.device)]
            if by_backward:
                products = self._by_backward(indices, batch, chosen)
            else:
                with self._gradients(indices, batch) as rows:
                    products = rows.combine(chosen)
            for parameter, part in products.items():
                total[parameter] = total[parameter] + part if parameter in total else part
        self._combined = weights, total
        return total

    def _by_backward(self, indices: Tensor, batch: Any, weights: Tensor) -> Direction:
        with self._captured(indices, batch) as captured:
            leaves = [p for p in captured.leaves if self.scored(p)]
            gradients = backward_to(leaves, captured.losses, weights, leaves, retain_graph=False)
        found = zip(leaves, gradients, strict=True)
        return {p: g.to_dense() for p, g in found if g is not None}

    def dot(self, direction: Direction) -> Tensor:
        """G v, (n,), pushed forwards where that is right: low precision carries it badly."""
        known, model = self.engine.known, self.losses_of.model
        if self.engine.kind == "auto" and not known.get(STAYS_BACK) and in_full_precision(model):
            try:
                return self._pushed(direction)
            except RuntimeError as error:
                known[STAYS_BACK] = True
                text = "scores of the data set take a backward pass, and do not go forwards: %s"
                logger.info(text, str(error).split("\n")[0])
        return _in_order((some, rows.dot(direction)) for some, rows in self.blocks(self._all()))

    def _pushed(self, direction: Direction) -> Tensor:
        size = self.reader.batch_size
        # One batch for the engine too, and then two at once if their graphs hold little.
        first, others = self.samples[:size], self.samples[size:]
        at_once = 2 * size if 2 * size * self._numbers < SMALL else size
        sizes = [len(first), *map(len, others.split(at_once) if len(others) else ())]
        parts: list[tuple[Tensor, Tensor]] = []
        for some, indices, batch in self._read(self._all(), sizes):
            with self._captured(indices, batch) as captured:
                scores = widened(captured.passes.push(direction).detach())
            if not parts:
                with self._gradients(indices, batch) as rows:
                    expected = rows.dot(direction)
                _check_difference((scores - expected).abs().max(), expected.abs().max())
            parts.append((some, scores))
        scores = _in_order(parts)
        if self._combined is not None:  # w^T (G v) = (G^T w)^T v
            weights, combined = self._combined
            terms = weights * scores
            product = sum((combined[p] * v).sum() for p, v in direction.items() if p in combined)
            _check_difference((terms.sum() - product).abs(), terms.abs().sum())
        return scores

    def gram(self) -> Tensor:
        raise RuntimeError(
            f"G G^T of a data set has {self.batch_size}^2 entries: a rule of the global scheme may "
            "use combine and dot"
        )

    def blocks(
        self, positions: Tensor, sizes: list[int] | None = None
    ) -> Iterator[tuple[Tensor, PerSampleGradients]]:
        """Yield pieces of ``positions`` with the gradients of each."""
        for some, indices, batch in self._read(positions, sizes):
            with self._gradients(indices, batch) as rows:
                yield some, rows

    def _read(
        self, positions: Tensor, sizes: list[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yield pieces of ``positions`` with dataset indices and batch."""
        for places, batch in self.reader.batches(self.samples[positions], sizes):
            some = positions[places]
            yield some, self.samples[some], batch
            self.advance(len(some))

    @contextmanager
    def _gradients(self, indices: Tensor, batch: Any) -> Iterator[PerSampleGradients]:
        with self._captured(indices, batch) as captured:
            device = captured.losses.device
            with torch.no_grad(), torch.autocast(device_type=device.type, enabled=False):
                captured.start(torch.ones((), device=device), keep_graph=False)
                yield captured.rows(self.scored)

    def _captured(self, indices: Tensor, batch: Any) -> closing[LossGradients]:
        """The losses of a batch with their graph."""
        with torch.enable_grad():
            losses = self._losses_of(indices, batch).losses
        captured = LossGradients(self.engine, losses)
        if math.isinf(self._numbers):
            held = sum(shape_of(node).numel() for node in captured.graph.order)
            self._numbers = held / len(losses)
        return closing(captured)

    def _losses_of(self, indices: Tensor, batch: Any) -> PerSampleLosses:
        part = self.losses_of(batch)
        if len(part.losses) != len(indices):
            raise ValueError(
                f"{len(indices)} samples of the data set gave {len(part.losses)} losses: expected "
                "a collate_fn that keeps every sample, and one loss for each"
            )
        self.consistency.note(indices, part.losses)
        return part

    def probe(self, indices: Tensor, batch: Any, direction: Direction | None) -> Tensor:
        """What tells samples apart: losses, and G v, (b, 1 or 2)."""
        columns = [widened(self._losses_alone(indices, batch).losses)]
        if direction is not None:
            with self._gradients(indices, batch) as rows:
                columns.append(rows.dot(direction).to(columns[0].dtype))
        return torch.stack(columns, 1)

    def interleaved(self) -> tuple[Tensor, list[int]]:
        """All rows for `losses`, in batches of twice the size."""
        size = 2 * self.reader.batch_size
        batches = []
        for piece in self._all().split(8 * size):  # reading stays local
            number = -(-len(piece) // size)
            batches += [piece[first::number] for first in range(number)]
        return torch.cat(batches), [len(batch) for batch in batches]

    def read_in_other_batches(self) -> None:
        """Note losses in other batches than those of `losses`."""
        in_one_batch = self.batch_size <= 2 * self.reader.batch_size
        some = self.samples[1::2] if in_one_batch else self.samples
        for places, batch in self.reader.batches(some):
            self._losses_alone(some[places], batch)

    def _losses_alone(self, indices: Tensor, batch: Any) -> PerSampleLosses:
        """No graph is made, unless the losses are derivatives."""
        known = self.engine.known
        try:
            with torch.set_grad_enabled(bool(known.get(DIFFERENTIATES))):
                part = self._losses_of(indices, batch)
        except RuntimeError as error:
            if known.get(DIFFERENTIATES) or "does not require grad" not in str(error):
                raise
            known[DIFFERENTIATES] = True
            return self._losses_alone(indices, batch)
        return part._replace(losses=part.losses.detach())


@dataclass(eq=False)
class DatasetOverRanks(DatasetGradients):
    """The same rows on every process: products are collectives, of a part each."""

    ranks: Ranks
    layout: Sequence[Tensor]  # parameters in an order that all ranks have

    def losses(self) -> PerSampleLosses:
        """The losses: an all-gather of n numbers."""
        positions = self._own_positions()
        # Whoever has none reads another's, and drops its loss.
        read = positions if len(positions) else torch.zeros(1, dtype=torch.int64, device="cpu")
        own = some_of(DatasetGradients.losses(self.of(read)), slice(len(positions)))
        return join([Pass(own, 1.0)], self.ranks)[0]

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w: an all-reduce of P."""
        used = weights.nonzero().squeeze(1)
        mine = used.tensor_split(self.ranks.number)[self.ranks.rank]
        part = torch.zeros_like(weights).index_copy(0, mine, weights[mine])
        return self.ranks.total(super().combine(part), self.layout)

    def dot(self, direction: Direction) -> Tensor:
        """G v: an all-gather of n numbers."""
        if len(positions := self._own_positions()):
            own = DatasetGradients.dot(self.of(positions), direction)
        else:
            own = next(iter(direction.values())).new_empty(0)
        return self.ranks.gather(own)

    def _own_positions(self) -> Tensor:
        """Contiguous, in the order of the ranks."""
        pieces = self._all().tensor_split(self.ranks.number)
        self.ranks.sizes = [len(piece) for piece in pieces]
        return pieces[self.ranks.rank]


def _in_order(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The values of batches, (places, values), by place."""
    places, values = zip(*parts, strict=True)
    joined = torch.cat(values)
    return joined[torch.cat(places).argsort().to(joined.device)]


def _check_difference(difference: Tensor, scale: Tensor) -> None:
    """Raise a RuntimeError for more than rounding."""
    tolerance = 1e-8 if scale.dtype == torch.float64 else 1e-3
    alike = difference <= tolerance * scale + torch.finfo(scale.dtype).tiny
    if not bool(alike | ~scale.isfinite()):  # what is not finite is for the scheme to say
        raise RuntimeError(
            f"it differs from backward by {float(difference):.2g} in {float(scale):.2g}"
        )
