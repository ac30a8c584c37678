"""Where the batch is in what a layer reads and computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]
"""Brings the batch to the first dimension."""


def layout_of(
    shape: torch.Size, batch_size: int, is_sequence: bool, time_major: bool = False
) -> Layout | None:
    """How to bring the batch to dimension 0 of a tensor with these leading dimensions.

    A guess where sizes coincide; the engine compares its products with autograd.
    """
    if shape and shape[0] == batch_size and not time_major:
        return _as_it_is
    if not is_sequence or not shape or not batch_size:
        return None
    if len(shape) > 1 and shape[1] == batch_size:
        return _batch_second
    if shape[0] % batch_size == 0:
        if time_major:
            return lambda t: t.unflatten(0, (-1, batch_size)).transpose(0, 1)
        return lambda t: t.unflatten(0, (batch_size, -1))
    return None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _batch_second(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)
