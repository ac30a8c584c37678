"""Several batches as one: their matrices one above the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from irw_optim.gradients.materialized import blocked_gram
from irw_optim.gradients.protocol import Direction, PerSampleGradients


class ConcatenatedGradients:
    """The rows of several batches in their order: G = [G_1; G_2; ...].

    A parameter that a batch did not use has rows of zeros there. Weights have the device and the
    dtype of ``like``.

    >>> from irw_optim.gradients import MaterializedGradients
    >>> weight = torch.zeros(1)
    >>> rows = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    >>> G = ConcatenatedGradients([MaterializedGradients({weight: r}) for r in rows], like=weight)
    >>> G.combine(torch.ones(3))[weight], G.dot({weight: torch.ones(1)})
    (tensor([6.]), tensor([1., 2., 3.]))
    >>> G.gram()[2]
    tensor([3., 6., 9.])
    """

    def __init__(self, parts: Iterable[PerSampleGradients], like: Tensor) -> None:
        self.parts = list(parts)
        self.sizes = [part.batch_size for part in self.parts]
        self.batch_size = sum(self.sizes)
        self.like = like

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        total: dict[Tensor, Tensor] = {}
        for part, some in zip(self.parts, weights.split(self.sizes), strict=True):
            for p, gradient in part.combine(some).items():
                total[p] = total[p] + gradient if p in total else gradient
        return total

    def dot(self, direction: Direction) -> Tensor:
        return torch.cat([part.dot(direction) for part in self.parts])

    def gram(self) -> Tensor:
        """Across batches only the rows themselves meet: they are made a block at a time."""
        zeros = self.combine(self.like.new_zeros(self.batch_size))

        def rows(samples: slice) -> dict[Tensor, Tensor]:
            each = [{**zeros, **self._row(i)} for i in range(self.batch_size)[samples]]
            return {p: torch.stack([row[p] for row in each]) for p in zeros}

        numbers = sum(t.numel() for t in zeros.values())
        return blocked_gram(self.batch_size, numbers, rows)

    def _row(self, sample: int) -> dict[Tensor, Tensor]:
        part = 0
        while sample >= self.sizes[part]:
            sample -= self.sizes[part]
            part += 1
        one = self.like.new_zeros(self.sizes[part])
        one[sample] = 1
        return self.parts[part].combine(one)
