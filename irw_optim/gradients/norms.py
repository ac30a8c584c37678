"""Norms of per-sample gradients from layer inputs and output gradients: |g_i| without g_i.

A linear map has |g_i| = |a_i| |b_i|; with positions t, |g_i|^2 by the smaller of two products::

    sum over t, t' of <a_it, a_it'> <b_it, b_it'>      (T x T)
    | sum over t of b_it a_it^T |^2                    (d' x d)

Convolutions are linear maps of patches, embeddings of one-hot vectors; the rest goes by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from irw_optim.gradients.ghost import GhostGradients, _sharing_parameters
from irw_optim.gradients.layers import ConvolutionCall, EmbeddingCall, LayerCall, LinearCall
from irw_optim.gradients.layers._products import summed_rows
from irw_optim.gradients.protocol import MEMORY_BOUND, as_matrix, widened


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
