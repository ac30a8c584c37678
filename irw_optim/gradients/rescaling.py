"""Products that are quadratic in the gradients, for gradients of any size.

Losses times 1e-24 have scores (1e-48) that float32 does not hold. The products of k G give the same
weights. Whether k is needed shows in the finished product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.protocol import (
    Direction,
    MaterializedGradients,
    PerSampleGradients,
    align,
    blocked_gram,
    widened,
)

_ROUNDS = 4
"""From infinity at most two to a number, and two into the range."""


class Look(NamedTuple):
    """What a look at finished products shows, in one wait for a device."""

    size: float  # the largest of them
    in_range: bool  # whether it, and what led to it, is far from both ends of the range
    finite: bool  # whether all of them are, and the losses
    doubted: bool  # whether the engine has shown that they are wrong
    everybody: bool  # whether all samples are present
    mass: float  # of the positive ones


def align_in_range(
    gradients: PerSampleGradients,
    coefficients: Tensor,
    losses: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, float, Look]:
    """G G^T c for c of (B,), or ``(k G)(k G)^T c`` and k, a power of two, where 1 will not do.

    The losses, (B,), are to be finite as well, and all to be ``present``.
    """
    aligned = getattr(gradients, "align", None) or partial(align, gradients)
    scores: Tensor = aligned(coefficients)
    look = _look(scores, gradients, losses, present)
    if look.doubted:
        gradients.settle_doubt()  # type: ignore[attr-defined]
        scores = aligned(coefficients)
        look = _look(scores, gradients, losses, present)
    if look.in_range:
        return scores, 1.0, look
    found = _rescaled(scores, look.size, gradients, lambda rows: align(rows, coefficients))
    return *found, look._replace(finite=False, mass=0.0)


def gram_in_range(
    gradients: PerSampleGradients, losses: Tensor | None = None, present: Tensor | None = None
) -> tuple[Tensor, float, Look]:
    """The same of ``(k G)(k G)^T``, (B, B)."""
    gram = gradients.gram()
    look = _look(gram.diagonal(), gradients, losses, present)
    if look.in_range:
        return gram, 1.0, look
    found = _rescaled(gram, look.size, gradients, lambda rows: rows.gram())
    return *found, look._replace(finite=False)


class RescaledGradients:
    """k G, from products that are linear in G; ``like`` has their device and dtype."""

    def __init__(self, gradients: PerSampleGradients, factor: float, like: Tensor) -> None:
        self.gradients, self.factor, self.like = gradients, factor, like
        self.batch_size = gradients.batch_size

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return self._times_factor(self.gradients.combine(weights))

    def dot(self, direction: Direction) -> Tensor:
        return self.gradients.dot(direction) * self.factor

    def align(self, coefficients: Tensor) -> Tensor:
        """Engines that hold no whole direction have an ``align_rescaled``."""
        own: Any = getattr(self.gradients, "align_rescaled", None)
        if own is None:
            return self.dot(self.combine(coefficients))
        scores: Tensor = own(coefficients, self.factor)
        return scores

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
        one = torch.eye(self.batch_size, dtype=self.like.dtype, device=self.like.device)
        return torch.stack([self.align(column) for column in one])

    def _times_factor(self, parts: Direction) -> dict[Tensor, Tensor]:
        return {p: widened(part) * self.factor for p, part in parts.items()}


def unscaled(product: Tensor, factor: float) -> Tensor:
    """The product of G out of that of k G: in float64, or at its end."""
    if factor == 1.0:
        return product
    wide = product.double()
    return (wide / factor / factor).nan_to_num() if bool(wide.isfinite().all()) else wide


def _look(
    squares: Tensor,
    gradients: PerSampleGradients,
    losses: Tensor | None = None,
    present: Tensor | None = None,
) -> Look:
    if not gradients.batch_size:
        return Look(0.0, True, True, False, True, 0.0)
    seed, doubt = getattr(gradients, "seed", None), getattr(gradients, "doubt", None)
    if squares.device.type != "cpu":
        sent = squares, losses, seed, doubt, present
        squares, losses, seed, doubt, present = _on_host(*sent, dtype=squares.dtype)
    size: float = torch.linalg.vector_norm(squares, math.inf).item()  # NaN if one is NaN
    # The way to a product may be quadratic in the seed, too.
    quadratic = size if seed is None else size * seed.item() ** 2
    low, high = _range_of(squares.dtype)
    return Look(
        size,
        low <= size <= high and low <= quadratic <= high,
        math.isfinite(size) and (losses is None or math.isfinite(losses.sum().item())),
        doubt is not None and not gradients.adds_up(doubt),  # type: ignore[attr-defined]
        present is None or bool(present.all()),
        squares.relu().sum().item(),
    )


def _on_host(*tensors: Tensor | None, dtype: torch.dtype) -> list[Any]:
    """All in one message."""
    sent = [t.flatten().to(dtype) for t in tensors if t is not None]
    message = iter(torch.cat(sent).cpu().split([len(t) for t in sent]))
    return [None if t is None else next(message) for t in tensors]


def _rescaled(
    plain: Tensor,
    size: float,
    gradients: PerSampleGradients,
    product: Callable[[PerSampleGradients], Tensor],
) -> tuple[Tensor, float]:
    """The product of gradients times a k that brings it into range, and k; else ``plain``, 1."""
    low, high = _range_of(plain.dtype)
    reach, exponent = math.frexp(high)[1], 0
    for _ in range(_ROUNDS):
        if size == 0 or not math.isfinite(size):
            exponent += reach if size == 0 else -reach
        elif not low <= size <= high:
            exponent += -math.frexp(size)[1] // 2
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
    """Roots of the least and of the largest number: a product's factors fit too."""
    limits = torch.finfo(dtype)
    return limits.tiny**0.5, limits.max**0.5
