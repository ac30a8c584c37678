"""Products that are quadratic in the gradients, for gradients of any size.

Losses times 1e-24 have gradients that float32 holds, and scores (1e-48) that it does not. Weights
are free of that scale, so the products of k G are as good as those of G. Whether k is needed shows
in the finished product: one look at B numbers, and in the ordinary range nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.materialized import MaterializedGradients, blocked_gram, widened
from irw_optim.gradients.protocol import Direction, PerSampleGradients, align

_ROUNDS = 4
"""From infinity it takes at most two steps to a number, and two from there into the range."""


def align_in_range(
    gradients: PerSampleGradients, coefficients: Tensor, losses: Tensor | None = None
) -> tuple[Tensor, float, bool]:
    """``(k G)(k G)^T c``, shape (B,), the power of two k, and whether all of it is finite.

    k is 1 wherever that will do. Where none helps (the gradients are zero, or not finite
    themselves), the product is plain.

    Args:
        gradients: G.
        coefficients: c, (B,).
        losses: (B,), which are to be finite as well.
    """
    scores = align(gradients, coefficients)
    look = _look(scores, gradients, losses)
    if look.doubted:
        gradients.settle_doubt()  # type: ignore[attr-defined]
        scores = align(gradients, coefficients)
        look = _look(scores, gradients, losses)
    if look.in_range:
        return scores, 1.0, look.finite
    return *_rescaled(scores, look.size, gradients, lambda rows: align(rows, coefficients)), False


def gram_in_range(
    gradients: PerSampleGradients, losses: Tensor | None = None, present: Tensor | None = None
) -> tuple[Tensor, float, bool, bool]:
    """``(k G)(k G)^T``, shape (B, B), the power of two k; and whether all of it is finite.

    Args:
        gradients: G.
        losses: (B,), which are to be finite as well.
        present: (B,) bool; whether that is everybody is the fourth answer.
    """
    gram = gradients.gram()
    look = _look(gram.diagonal(), gradients, losses, present)
    if look.in_range:
        return gram, 1.0, look.finite, look.everybody
    found = _rescaled(gram, look.size, gradients, lambda rows: rows.gram())
    return *found, False, look.everybody


class RescaledGradients:
    """k G, from products that are linear in G.

    Args:
        gradients: G, by any engine.
        factor: k, a power of two.
        like: of the device and the dtype of the products.
    """

    def __init__(self, gradients: PerSampleGradients, factor: float, like: Tensor) -> None:
        self.gradients = gradients
        self.factor = factor
        self.like = like
        self.batch_size = gradients.batch_size

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return self._times_factor(self.gradients.combine(weights))

    def dot(self, direction: Direction) -> Tensor:
        return self.gradients.dot(direction) * self.factor

    def align(self, coefficients: Tensor) -> Tensor:
        """An engine that does not hold a whole direction has an ``align_rescaled``."""
        own = getattr(self.gradients, "align_rescaled", None)
        if own is not None:
            return own(coefficients, self.factor)  # type: ignore[no-any-return]
        return self.dot(self.combine(coefficients))

    def gram(self) -> Tensor:
        """By rows where the engine makes them; else a column at a time."""
        gradients = self.gradients
        if isinstance(gradients, MaterializedGradients):
            return MaterializedGradients(self._times_factor(gradients.rows)).gram()
        if isinstance(gradients, GhostGradients | AutodiffGradients):
            rows = gradients.rows
            numbers = sum(row.numel() for row in rows(slice(0, 1)).values())
            return blocked_gram(
                self.batch_size, numbers, lambda samples: self._times_factor(rows(samples))
            )
        size = self.batch_size
        one = torch.eye(size, dtype=self.like.dtype, device=self.like.device)
        return torch.stack([self.align(one[i]) for i in range(size)])

    def _times_factor(self, parts: Direction) -> dict[Tensor, Tensor]:
        return {p: widened(part) * self.factor for p, part in parts.items()}


def unscaled(product: Tensor, factor: float) -> Tensor:
    """The product of G out of that of k G: in float64, and where even that ends, at its end."""
    if factor == 1.0:
        return product
    wide = product.double()
    return (wide / factor / factor).clamp(*_FLOAT64) if bool(wide.isfinite().all()) else wide


_FLOAT64 = (torch.finfo(torch.float64).min, torch.finfo(torch.float64).max)


class _Look(NamedTuple):
    """What one look at finished products shows, which waits for a device once.

    Attributes:
        size: the largest of them.
        in_range: whether it is far from both ends of the range, and what led to it.
        finite: whether all of them are finite, and the losses.
        doubted: whether the engine has shown that they are wrong.
        everybody: whether all samples are present.
    """

    size: float
    in_range: bool
    finite: bool
    doubted: bool
    everybody: bool


def _look(
    squares: Tensor,
    gradients: PerSampleGradients,
    losses: Tensor | None = None,
    present: Tensor | None = None,
) -> _Look:
    if not gradients.batch_size:
        return _Look(0.0, True, True, False, True)
    largest: Tensor = torch.linalg.vector_norm(squares, math.inf)  # NaN if one is NaN
    seed, doubt = getattr(gradients, "seed", None), getattr(gradients, "doubt", None)
    # What there is none of is stood in for, so that the numbers keep their places.
    numbers = [
        largest,
        largest if seed is None else seed,
        largest if losses is None else losses.sum(),
    ]
    if doubt is not None or present is not None:
        numbers += [largest * 0 if doubt is None else doubt]
        numbers += [largest if present is None else present.all()]
    if squares.device.type == "cpu":
        found = list(map(Tensor.item, numbers))
    else:
        found = torch.stack([number.to(squares.dtype) for number in numbers]).tolist()
    size, factor, of_losses, *others = found
    # The engine's way to a product may be quadratic in what its gradients carry, too.
    quadratic = size if seed is None else size * factor**2
    low, high = _range_of(squares.dtype)
    return _Look(
        size,
        low <= size <= high and low <= quadratic <= high,
        math.isfinite(size) and math.isfinite(of_losses),
        doubt is not None and others[0] > 0,
        present is None or others[1] > 0,
    )


def _rescaled(
    plain: Tensor,
    size: float,
    gradients: PerSampleGradients,
    product: Callable[[PerSampleGradients], Tensor],
) -> tuple[Tensor, float]:
    """A product of k G, for a k that brings it into the range; the plain one where none does."""
    low, high = _range_of(plain.dtype)
    reach, exponent = math.frexp(high)[1], 0
    for _ in range(_ROUNDS):
        exponent += _step(size, low, high, reach)
        exponent = max(-2 * reach, min(exponent, 2 * reach - 4))
        factor = math.ldexp(1.0, exponent)
        found = product(RescaledGradients(gradients, factor, plain))
        squares = found if found.ndim == 1 else found.diagonal()
        size = float(torch.linalg.vector_norm(squares, math.inf))
        if low <= size <= high:
            return found, factor
        if size == 0 or (not math.isfinite(size) and exponent == -2 * reach):
            break
    return plain, 1.0


@cache
def _range_of(dtype: torch.dtype) -> tuple[float, float]:
    """Roots of the least and of the largest number: in between, a product's factors fit too."""
    limits = torch.finfo(dtype)
    return limits.tiny**0.5, limits.max**0.5


def _step(size: float, low: float, high: float, reach: int) -> int:
    """By how many powers of two the gradients should grow."""
    if low <= size <= high:
        return 0
    if size > 0 and math.isfinite(size):
        return -math.frexp(size)[1] // 2
    return reach if size == 0 else -reach
