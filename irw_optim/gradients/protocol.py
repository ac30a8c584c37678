"""The door between gradients and weights: three products with a matrix that is never built.

G has one row per sample, g_i, and one column per trainable number: shape (B, P).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Direction: TypeAlias = Mapping[Tensor, Tensor]
"""A vector of P numbers: for each parameter a tensor of its shape. Missing ones count as 0."""


@runtime_checkable
class PerSampleGradients(Protocol):
    """The per-sample gradients of one batch, as the matrix G of shape (B, P)."""

    @property
    def batch_size(self) -> int:
        """B, the number of rows of G."""

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w for ``weights`` of shape (B,): one tensor per parameter."""

    def dot(self, direction: Direction) -> Tensor:
        """G v for a direction v: shape (B,), in float32 or better."""

    def gram(self) -> Tensor:
        """G G^T: shape (B, B), in float32 or better."""


class StackedGradients:
    """Several engines side by side, each with parameters of its own: G = [G_1 | G_2 | ...]."""

    def __init__(self, parts: Iterable[PerSampleGradients]) -> None:
        self.parts = list(parts)
        self.batch_size = self.parts[0].batch_size
        seeds = [part.seed for part in self.parts if hasattr(part, "seed")]
        self.seed: Tensor | None = seeds[0] if seeds else None

    @property
    def doubt(self) -> Tensor | None:
        """What tells whether the newest `align` adds up, of all engines; None if it surely does."""
        doubts = [part.doubt for part in self._in_doubt()]
        return torch.cat(doubts) if doubts else None

    def adds_up(self, sides: Sequence[float]) -> bool:
        """Whether it does in every engine."""
        doubtful = self._in_doubt()
        each = len(sides) // len(doubtful)
        return all(p.adds_up(sides[n * each :][:each]) for n, p in enumerate(doubtful))

    def settle_doubt(self) -> None:
        """Take other ways from now on."""
        for part in self._in_doubt():
            part.settle_doubt()

    def _in_doubt(self) -> list[Any]:
        return [part for part in self.parts if getattr(part, "doubt", None) is not None]

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return {p: t for part in self.parts for p, t in part.combine(weights).items()}

    def dot(self, direction: Direction) -> Tensor:
        return added(part.dot(direction) for part in self.parts)

    def gram(self) -> Tensor:
        return added(part.gram() for part in self.parts)

    def align(self, coefficients: Tensor) -> Tensor:
        return added(align(part, coefficients) for part in self.parts)


def added(products: Iterable[Tensor]) -> Tensor:
    """Their sum, one after the other: those of pairs of samples are too large to be all held."""
    each = iter(products)
    return sum(each, start=next(each))


def align(gradients: PerSampleGradients, coefficients: Tensor) -> Tensor:
    """G (G^T c), shape (B,): how far each row points along the combination c of all rows.

    An engine that has a shorter way than `combine` and `dot` says so with a method ``align``.
    """
    shorter = getattr(gradients, "align", None)
    if shorter is not None:
        return shorter(coefficients)  # type: ignore[no-any-return]
    return gradients.dot(gradients.combine(coefficients))
