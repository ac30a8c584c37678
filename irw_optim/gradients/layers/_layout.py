"""Where the batch is in what a layer reads and computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where the batch stands, whatever the sizes.

    In ``dim``, where it may be folded with positions: ``"batch major"`` as in (B * T, d), or
    ``"batch minor"`` as in (T * B, d).
    """

    dim: int
    fold: str = ""

    def bring(self, tensor: Tensor, batch_size: int) -> Tensor:
        """The tensor with the batch as its first dimension."""
        dim, fold = self
        if fold == "batch major":
            tensor = tensor.unflatten(dim, (batch_size, -1))
        elif fold == "batch minor":
            tensor, dim = tensor.unflatten(dim, (-1, batch_size)), dim + 1
        return tensor.movedim(dim, 0) if dim else tensor


FIRST = Layout(0)


def layouts_of(
    shape: torch.Size, batch_size: int, is_sequence: bool, time_major: bool = False
) -> tuple[Layout, ...]:
    """Every place where the batch may be in tensors with these leading dimensions.

    More than one where sizes coincide: then only the graph shows which is right. In a sequence it
    may stand elsewhere than first; behind the positions where that is ``time_major``.
    """
    if not shape:
        return ()
    if time_major:
        if len(shape) > 1:
            return (Layout(1),) if shape[1] == batch_size else ()
        return (Layout(0, "batch minor"),) if batch_size and shape[0] % batch_size == 0 else ()
    if shape[0] == batch_size and (batch_size < 2 or not is_sequence):
        return (FIRST,)
    if not is_sequence:
        return ()
    found = [Layout(dim) for dim, size in enumerate(shape) if size == batch_size]
    if batch_size == 1:  # all is of the one sample
        return (found[0] if found else Layout(0, "batch major"),)
    if batch_size and shape[0] > batch_size and shape[0] % batch_size == 0:
        found += [Layout(0, "batch major"), Layout(0, "batch minor")]
    return tuple(found)
