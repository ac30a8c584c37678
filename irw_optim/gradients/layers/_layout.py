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
    if shape[0] % batch_size:
        return None

    def folded(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch_size, -1, *tensor.shape[1:])

    def folded_time_first(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, batch_size, *tensor.shape[1:]).transpose(0, 1)

    return folded_time_first if time_major else folded


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _batch_second(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)
