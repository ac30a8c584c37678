"""Products of numbers in any precision, and Gram matrices without a row of G per sample.

Devices multiply bfloat16 as it is and add in float32: that is exact, but w_i b_i and g_S are
rounded as autocast rounds activations. The CPU widens, being slower with bfloat16; and float16 is
too narrow for w_i b_i.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from irw_optim.gradients.protocol import MEMORY_BOUND, WIDER, as_matrix, blocked_gram, widened
from irw_optim.torch_internals import sums_wide

if TYPE_CHECKING:
    from ._call import LayerCall


def operands(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as products take them."""
    if a.dtype == b.dtype and (a.dtype not in WIDER or stays(a)):
        return a, b
    return widened(a), widened(b)


def stays(tensor: Tensor) -> bool:
    """Whether products take half precision as it is."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type != "cpu"


def product(left: Tensor, right: Tensor, *, narrow: bool = False) -> Tensor:
    """``left @ right`` of (stacks of) matrices: in float32 or better unless ``narrow``."""
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
    """Row-wise inner products in float32 or better, (B,); ``in_place`` of the right."""
    terms = right.mul_(left) if in_place else right * left
    return terms.sum(tuple(range(1, terms.ndim)), dtype=WIDER.get(terms.dtype))


def gram_of(rows: Tensor) -> Tensor:
    """R R^T of per-sample rows (B, ...)."""
    matrix = as_matrix(rows)
    return matrix @ matrix.T


def gram_of_positions(a: Tensor, b: Tensor, alike: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over t, t' of alike(a_it, a_jt') <b_it, b_jt'>."""
    batch, length = a.shape[:2]
    step = max(1, MEMORY_BOUND // max(1, 2 * batch * length * length))
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    blocks = []
    for some_a, some_b in zip(a.split(step), b.split(step), strict=True):
        products = alike(some_a.flatten(0, 1), flat_a) * product(some_b.flatten(0, 1), flat_b.T)
        blocks.append(products.view(len(some_a), length, batch, length).sum((1, 3)))
    return torch.cat(blocks)


def gram_of_rows(calls: "Sequence[LayerCall]") -> Tensor:
    """G G^T where several calls meet in a parameter."""
    parameters = {p for call in calls for p in call.parameters.values()}
    numbers = sum(p.numel() for p in parameters)
    return blocked_gram(len(calls[0].b), numbers, lambda samples: summed_rows(calls, samples))


def summed_rows(calls: "Sequence[LayerCall]", samples: slice) -> dict[Tensor, Tensor]:
    """Of some samples, over calls that share parameters."""
    return summed(call.rows(samples) for call in calls)


def summed(parts: Iterable[Mapping[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """By parameter."""
    total: dict[Tensor, Tensor] = {}
    for part in parts:
        for p, tensor in part.items():
            total[p] = total[p] + tensor if p in total else tensor
    return total
