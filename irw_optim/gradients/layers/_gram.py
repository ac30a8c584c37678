"""Gram matrices that never need a row of G per sample, a block of samples at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from irw_optim.gradients.layers._precision import product
from irw_optim.gradients.materialized import MEMORY_BOUND, as_matrix, blocked_gram

if TYPE_CHECKING:
    from irw_optim.gradients.layers._call import LayerCall


def gram_of(rows: Tensor) -> Tensor:
    """R R^T of per-sample rows (B, ...)."""
    matrix = as_matrix(rows)
    return matrix @ matrix.T


def gram_of_positions(a: Tensor, b: Tensor, with_bias: bool) -> Tensor:
    """Sum over t, t' of (<a_it, a_jt'> + bias) <b_it, b_jt'>, a block of samples i at a time."""
    batch, length = a.shape[:2]
    step = max(1, MEMORY_BOUND // max(1, 2 * batch * length * length))
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    blocks = []
    for some_a, some_b in zip(a.split(step), b.split(step), strict=True):
        products = product(some_a.flatten(0, 1), flat_a.T)
        products = (products + with_bias) * product(some_b.flatten(0, 1), flat_b.T)
        blocks.append(products.view(len(some_a), length, batch, length).sum((1, 3)))
    return torch.cat(blocks)


def gram_of_lookups(index: Tensor, b: Tensor) -> Tensor:
    """Sum over t, t' with equal index of <b_it, b_jt'>, a block of samples i at a time."""
    batch, length = index.shape
    step = max(1, MEMORY_BOUND // max(1, 2 * batch * length * length))
    flat_index, flat_b = index.flatten(), b.flatten(0, 1)
    blocks = []
    for some_index, some_b in zip(index.split(step), b.split(step), strict=True):
        same = some_index.reshape(-1, 1) == flat_index
        products = same * (some_b.flatten(0, 1) @ flat_b.T)
        blocks.append(products.view(len(some_index), length, batch, length).sum((1, 3)))
    return torch.cat(blocks)


def gram_of_rows(calls: Sequence[LayerCall]) -> Tensor:
    """G G^T of the parameters that these calls share, from rows a block of samples at a time.

    Needed where several calls meet in one parameter: g_i is then a sum over calls.
    """
    parameters = {p for call in calls for p in call.parameters.values()}
    numbers = sum(p.numel() for p in parameters)
    return blocked_gram(len(calls[0].b), numbers, lambda samples: summed_rows(calls, samples))


def summed_rows(calls: Sequence[LayerCall], samples: slice) -> dict[Tensor, Tensor]:
    """The rows of some samples, summed over the calls that share a parameter."""
    total: dict[Tensor, Tensor] = {}
    for call in calls:
        for p, block in call.rows(samples).items():
            total[p] = total[p] + block if p in total else block
    return total
