"""G of the batch of all ranks, of which no more than one group of layers is ever whole.

    s = G G^T c = sum over groups of G_l (G_l^T c)

Every group of columns has a term of its own, so the direction ``G_l^T c`` is made, summed over the
ranks, used and dropped, group after group: P numbers are sent, and one group of them is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from irw_optim.distributed.gram import gram_over
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.weigher import OverRanks
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.materialized import widened
from irw_optim.gradients.protocol import Direction, PerSampleGradients
from irw_optim.weighting.local_scheme import Scheme
from irw_optim.weighting.record import StepRecord


class LayerwiseGradients:
    """The rows of all ranks in the order of the ranks.

    Args:
        rows: this rank's.
        ranks: who knows how many samples each rank has.
        groups: the columns, as parameters, in groups and in an order that all ranks have.
    """

    def __init__(
        self, rows: GhostGradients, ranks: Ranks, groups: Sequence[Sequence[Tensor]]
    ) -> None:
        self.rows = rows
        self.ranks = ranks
        self.groups = groups
        self.batch_size = sum(ranks.sizes)

    def align(self, coefficients: Tensor) -> Tensor:
        """G (G^T c), (B,): an all-reduce for each group, P numbers together, and a gather of B."""
        return self.align_rescaled(coefficients, 1.0)

    def align_rescaled(self, coefficients: Tensor, factor: float) -> Tensor:
        """The same of ``factor`` times G: see `RescaledGradients`."""
        own = coefficients[self.ranks.own]
        # Of the columns, since a rank without samples has no rows to go by, and gathers too.
        double = any(p.dtype == torch.float64 for group in self.groups for p in group)
        scores = own.new_zeros(len(own), dtype=torch.float64 if double else torch.float32)
        for group in self.groups:
            part = self.rows.restricted_to(set(group))
            direction = self.ranks.total(part.combine(own), group)
            if factor != 1.0:
                direction = {p: widened(t) * factor for p, t in direction.items()}
            if part.calls:
                scores += part.dot(direction) * factor
        return self.ranks.gather(scores)

    def gram(self) -> Tensor:
        """G G^T: see `gram_over`."""
        terms = (
            gram_over(self.rows.restricted_to(set(group)), self.ranks, group)
            for group in self.groups
        )
        total = next(terms)
        for term in terms:
            total = total + term
        return total

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """Not on offer: it is as large as the model."""
        raise _as_large_as_the_model()

    def dot(self, direction: Direction) -> Tensor:
        """Not on offer: its argument is as large as the model."""
        raise _as_large_as_the_model()


def _as_large_as_the_model() -> NotImplementedError:
    return NotImplementedError(
        "a rule of one's own asked for a sum of gradients, which is as large as the model that "
        "FSDP shards: expected weighting='irw', 'cvar' or 'uniform'"
    )


class OverShards(OverRanks):
    """`OverRanks`, with the columns in groups."""

    def __init__(
        self,
        scheme: Scheme,
        note: Callable[[StepRecord], None],
        ranks: Ranks,
        groups: Sequence[Sequence[Tensor]],
        most_passes: int = 1,
    ) -> None:
        super().__init__(scheme, note, ranks, [p for group in groups for p in group], most_passes)
        self.groups = groups

    def over_ranks(self, rows: PerSampleGradients) -> PerSampleGradients:
        """G of the batch of all ranks, a group at a time."""
        if isinstance(rows, GhostGradients):
            return LayerwiseGradients(rows, self.ranks, self.groups)
        return super().over_ranks(rows)  # a rule that looks at losses alone
