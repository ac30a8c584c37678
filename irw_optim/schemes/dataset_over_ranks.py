"""G for a data set whose samples several processes read, each a part of them.

Every process has the whole data set at hand. So any of them may read any sample, and the work of
each product is shared out anew: nobody waits for the one whose part has all of the worst off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.backward.passes import Pass, some_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.weigher import join
from irw_optim.gradients.protocol import Direction
from irw_optim.schemes.dataset_gradients import DatasetGradients
from irw_optim.schemes.reading import DatasetReader


class DatasetOverRanks:
    """The rows of `DatasetGradients`, in the same order, on every process: all are collectives.

    Args:
        rows: all of them, of which this process runs a part.
        ranks: who takes part.
        layout: the columns, as parameters in an order that all ranks have.
    """

    def __init__(self, rows: DatasetGradients, ranks: Ranks, layout: Sequence[Tensor]) -> None:
        self.rows = rows
        self.ranks = ranks
        self.layout = layout
        self.samples = rows.samples
        self.batch_size = rows.batch_size

    def of(self, rows: Tensor) -> DatasetOverRanks:
        """These rows alone: ``rows`` is a bool mask (n,)."""
        return DatasetOverRanks(self.rows.of(rows), self.ranks, self.layout)

    def losses(self) -> PerSampleLosses:
        """The losses of all rows: an all-gather of n numbers."""
        positions = self._own_positions()
        # With fewer samples than processes, some read one that is not theirs, and drop its loss.
        read = positions if len(positions) else torch.zeros(1, dtype=torch.int64, device="cpu")
        own = some_of(self._at(read).losses(), slice(len(positions)))
        return join([Pass(own, 1.0)], self.ranks)[0]

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w: each process sums over its part of those with a weight, an all-reduce of P."""
        used = weights.nonzero().squeeze(1)
        mine = used.tensor_split(self.ranks.number)[self.ranks.rank]
        part = torch.zeros_like(weights).index_copy(0, mine, weights[mine])
        return self.ranks.total(self.rows.combine(part), self.layout)

    def dot(self, direction: Direction) -> Tensor:
        """G v: an all-gather of n numbers."""
        positions = self._own_positions()
        if len(positions):
            own = self._at(positions).dot(direction)
        else:
            own = next(iter(direction.values())).new_empty(0)
        return self.ranks.gather(own)

    def gram(self) -> Tensor:
        """Not on offer, as in one process."""
        return self.rows.gram()

    def _own_positions(self) -> Tensor:
        """A contiguous piece, so that the pieces in the order of the ranks are all rows."""
        pieces = torch.arange(self.batch_size, device="cpu").tensor_split(self.ranks.number)
        self.ranks.sizes = [len(piece) for piece in pieces]
        return pieces[self.ranks.rank]

    def _at(self, positions: Tensor) -> DatasetGradients:
        nobody = torch.zeros(self.batch_size, dtype=torch.bool, device="cpu")
        return self.rows.of(nobody.index_fill(0, positions, True))


def ranks_of(
    replica: DistributedDataParallel | None,
    model: nn.Module,
    reader: DatasetReader,
    options: dict[str, Any],
) -> Ranks | None:
    """The processes that make weights together; they compare data set and options first.

    None where a DDP is called inside of the model: that may broadcast buffers in every forward
    pass, and so all of its processes have to run as many.
    """
    if replica is None or any(child is replica for child in list(model.modules())[1:]):
        return None
    alike = {"the number of samples in the data set": reader.size, **options}
    return Ranks(replica.process_group, alike)
