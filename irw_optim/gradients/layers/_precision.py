"""In which dtype a product is computed, and in which it is summed.

Autocast hands the layers bfloat16. The product of two such numbers is exact in float32, so a device
that has cores for it multiplies them as they are and adds in float32: nothing is lost. What has to
become an operand first, w_i b_i and the direction g_S, is rounded to the 8 bits that autocast gives
every activation. Scores, weights and sums over positions are float32.

The CPU widens, since its products of bfloat16 are slower; so does everybody for float16, which does
not reach to the sizes that w_i b_i may have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irw_optim.gradients.materialized import WIDER, widened
from irw_optim.torch_internals import sums_wide


def operand(tensor: Tensor) -> Tensor:
    """The tensor as a product takes it: bfloat16 as it is on a device, else float32 or better."""
    if tensor.dtype not in WIDER:
        return tensor
    return tensor if stays(tensor) else widened(tensor)


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in one dtype."""
    if a.dtype not in WIDER and b.dtype not in WIDER:
        return a, b
    if a.dtype == b.dtype:
        return operand(a), operand(b)
    return widened(a), widened(b)


def stays(tensor: Tensor) -> bool:
    """Whether products take the tensor as it is, although it is in half precision."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type != "cpu"


def product(left: Tensor, right: Tensor, *, narrow: bool = False) -> Tensor:
    """``left @ right`` of two matrices, or of two stacks of them, in float32 or better.

    Args:
        left: (n, k) or (m, n, k).
        right: (k, l) or (m, k, l), of the same dtype.
        narrow: whether the result is an operand next, and may be rounded to one.
    """
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    if narrow or left.dtype not in WIDER:
        return multiply(left, right)
    if sums_wide(left.device.type):
        return multiply(left, right, out_dtype=torch.float32)
    return multiply(left, right).float()


def scaled(rows: Tensor, weights: Tensor, in_place: bool = False) -> Tensor:
    """Row i times w_i, in the dtype of the rows."""
    column = weights.view(-1, *[1] * (rows.ndim - 1))
    if weights.dtype == rows.dtype:
        return rows.mul_(column) if in_place else rows * column
    if rows.dtype in WIDER:  # rounded once, after the product
        return torch.mul(rows, column, out=rows if in_place else torch.empty_like(rows))
    return scaled(rows, weights.to(rows.dtype), in_place)


def inner(left: Tensor, right: Tensor, in_place: bool = False) -> Tensor:
    """Row-wise inner products, (B,), summed in float32 or better.

    Args:
        left: (B, ...).
        right: (B, ...); may be overwritten where ``in_place``, to spare memory.
        in_place: whether it is.
    """
    terms = right.mul_(left) if in_place else right * left
    return terms.sum(tuple(range(1, terms.ndim)), dtype=WIDER.get(terms.dtype))
