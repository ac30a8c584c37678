"""G of the batch of all ranks: each product is one of every rank's own rows, and one collective."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from irw_optim.distributed.gram import gram_over
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.protocol import Direction, PerSampleGradients


class GlobalGradients:
    """The rows of all ranks in the order of the ranks: G = [G_0; G_1; ...].

    Args:
        rows: this rank's rows, G_r.
        ranks: who knows how many samples each rank has.
        layout: the columns, as parameters in an order that all ranks have.
    """

    def __init__(self, rows: PerSampleGradients, ranks: Ranks, layout: Sequence[Tensor]) -> None:
        self.rows = rows
        self.ranks = ranks
        self.layout = layout
        self.batch_size = sum(ranks.sizes)

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w = sum over ranks of G_r^T w_r: an all-reduce of P numbers."""
        return self.ranks.total(self.rows.combine(weights[self.ranks.own]), self.layout)

    def dot(self, direction: Direction) -> Tensor:
        """G v = [G_0 v; G_1 v; ...]: an all-gather of B numbers."""
        return self.ranks.gather(self.rows.dot(direction))

    def gram(self) -> Tensor:
        """G G^T: see `gram_over`."""
        return gram_over(self.rows, self.ranks, self.layout)
