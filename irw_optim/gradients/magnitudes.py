"""How large gradients are: their norms, and products that are quadratic in them, of any size.

Losses times 1e-24 have scores (1e-48) that float32 does not hold. The products of k G give the same
weights. Whether k is needed shows in the finished product.

|g_i| needs no g_i. A linear map has |g_i| = |a_i| |b_i|; with positions t, |g_i|^2 by the smaller
of two products::

    sum over t, t' of <a_it, a_it'> <b_it, b_it'>      (T x T)
    | sum over t of b_it a_it^T |^2                    (d' x d)

Convolutions are linear maps of patches, embeddings of one-hot vectors; the rest goes by rows.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autodiff import AutodiffGradients
from .ghost import GhostGradients, _sharing_parameters
from .layers import ConvolutionCall, EmbeddingCall, LayerCall, LinearCall
from .layers._products import summed_rows
from .protocol import (
    MEMORY_BOUND,
    Direction,
    MaterializedGradients,
    PerSampleGradients,
    align,
    as_matrix,
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

    The losses, (B,), are to be finite as well, and all to be ``present``, (B,), or that many.
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
    seed, doubt = getattr(gradients, "seed", None), getattr(gradients, "doubt", ())
    if squares.device.type != "cpu":
        sent = squares, losses, seed, present, *doubt
        squares, losses, seed, present, *doubt = _on_host(*sent, dtype=squares.dtype)
    size: float = torch.linalg.vector_norm(squares, math.inf).item()  # NaN if one is NaN
    # The way to a product may be quadratic in the seed, too.
    quadratic = size if seed is None else size * seed.item() ** 2
    low, high = _range_of(squares.dtype)
    return Look(
        size,
        low <= size <= high and low <= quadratic <= high,
        math.isfinite(size) and (losses is None or math.isfinite(losses.sum().item())),
        bool(doubt) and not gradients.adds_up(torch.cat(doubt)),  # type: ignore[attr-defined]
        present is None or bool(present.all() and present.sum() >= gradients.batch_size),
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


def row_norms(gradients: GhostGradients) -> Tensor:
    """|g_i|, (B,), in float32 or better."""
    groups = _sharing_parameters(gradients.calls)
    squares = torch.stack([_squares(group) for group in groups]).sum(0)
    return squares.clamp(min=0).sqrt() / gradients.seed.abs()


def _squares(calls: Sequence[LayerCall]) -> Tensor:
    """Sum over the parameters that these calls share, (B,)."""
    call, *others = calls
    if isinstance(call, ConvolutionCall) and not others:
        return _convolution(call)
    if isinstance(call, EmbeddingCall) and not others:
        return _embedding(call)
    kinds = {(type(call), *map(id, call.parameters.values())) for call in calls}
    if type(call) is LinearCall and len(kinds) == 1:
        return _linear(calls)  # several: one call a time step
    return _by_rows(calls)


def _linear(calls: Sequence[LayerCall]) -> Tensor:
    parameters = calls[0].parameters
    with_bias, with_weight = "bias" in parameters, "weight" in parameters
    a, b = _joined([widened(call.input) for call in calls]), _joined([call.b for call in calls])
    if a.ndim == 2:
        return _square(b) * ((_square(a) if with_weight else 0) + with_bias)
    total = _square(b.sum(1)) if with_bias else b.new_zeros(len(b))
    return total + _outer(a, b) if with_weight else total


def _joined(sides: Sequence[Tensor]) -> Tensor:
    """The positions of all calls as (B, T, d); (B, d) without any."""
    if len(sides) == 1:
        return sides[0].flatten(1, -2) if sides[0].ndim > 2 else sides[0]
    return torch.cat([t.flatten(1, -2) if t.ndim > 2 else t.unsqueeze(1) for t in sides], 1)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """|sum_t b_it a_it^T|^2, (B,), for a of (B, T, d) and b of (B, T, d')."""
    _, length, width_in = a.shape
    width_out = b.shape[-1]
    if length * (width_in + width_out) < width_in * width_out:
        return _blocked(
            length * length, lambda a, b: ((a @ a.mT) * (b @ b.mT)).flatten(1).sum(1), a, b
        )
    return _blocked(width_in * width_out, lambda a, b: _square((b.mT @ a).flatten(1)), a, b)


def _convolution(call: ConvolutionCall) -> Tensor:
    """Groups are further samples."""
    total = call.b.new_zeros(len(call.b))
    if "bias" in call.parameters:
        total = total + _square(call.bias_rows)
    if "weight" in call.parameters:
        a, b = (side.flatten(0, 1).mT for side in call.patches())
        total = total + _outer(a, b).view(-1, call.groups).sum(1)
    return total


def _embedding(call: EmbeddingCall) -> Tensor:
    """Lookups of the same row add up before the norm is taken."""
    index = call.input.reshape(len(call.input), -1)
    b = call.b.reshape(*index.shape, -1)

    def block(index: Tensor, b: Tensor) -> Tensor:
        same = index.unsqueeze(1) == index.unsqueeze(2)
        return (same * (b @ b.mT)).flatten(1).sum(1)

    return _blocked(index.shape[1] ** 2, block, index, b)


def _by_rows(calls: Sequence[LayerCall]) -> Tensor:
    numbers = sum(p.numel() for p in {p for call in calls for p in call.parameters.values()})
    step = max(1, MEMORY_BOUND // numbers)
    blocks = []
    for start in range(0, len(calls[0].b), step):
        rows = summed_rows(calls, slice(start, start + step))
        blocks.append(torch.stack([_square(as_matrix(block)) for block in rows.values()]).sum(0))
    return torch.cat(blocks)


def _blocked(numbers: int, squares: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """So that no block holds more than `MEMORY_BOUND`."""
    parts = [t.split(max(1, MEMORY_BOUND // max(1, 2 * numbers))) for t in tensors]
    return torch.cat([squares(*some) for some in zip(*parts, strict=True)])


def _square(rows: Tensor) -> Tensor:
    return rows.square().sum(1)
