"""Changes through products: of matrices, convolutions, lookups, samples of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.forward._registry import (
    FORWARD,
    ForwardRule,
    Tangents,
    added,
    forward_rule,
    of_one_input,
)
from irw_optim.gradients.nodes import shape_of, signed


def _bilinear(multiply: Callable[[Tensor, Tensor], Tensor], left: str, right: str) -> ForwardRule:
    """``beta * summand + alpha * multiply(left, right)``, or without a summand."""

    def rule(node: Any, tangents: Tangents) -> Tensor | None:
        *summands, d_left, d_right = tangents
        product = added(
            None if d_left is None else multiply(d_left, getattr(node, f"_saved_{right}")),
            None if d_right is None else multiply(getattr(node, f"_saved_{left}"), d_right),
        )
        alpha, beta = getattr(node, "_saved_alpha", 1), getattr(node, "_saved_beta", 1)
        if product is not None and alpha != 1:
            product = product * alpha
        summand = summands[0] if summands else None
        if summand is not None and beta != 1:
            summand = summand * beta
        return added(product, summand)

    return rule


FORWARD.update(
    Mm=_bilinear(torch.mm, "self", "mat2"),
    Bmm=_bilinear(torch.bmm, "self", "mat2"),
    Mv=_bilinear(torch.mv, "self", "vec"),
    Dot=_bilinear(torch.dot, "self", "tensor"),
    Addmm=_bilinear(torch.mm, "mat1", "mat2"),
    Baddbmm=_bilinear(torch.bmm, "batch1", "batch2"),
    Addmv=_bilinear(torch.mv, "mat", "vec"),
)


@forward_rule("Convolution", "ConvolutionOverrideable")
def _convolution(node: Any, tangents: Tangents) -> Tensor | None:
    d_input, d_weight, d_bias = tangents
    settings = (
        [signed(n) for n in node._saved_stride],
        [signed(n) for n in node._saved_padding],
        [signed(n) for n in node._saved_dilation],
        node._saved_transposed,
        [signed(n) for n in node._saved_output_padding],
        node._saved_groups,
    )
    convolution: Any = torch.ops.aten.convolution.default
    total = None
    if d_weight is not None:
        total = convolution(node._saved_input, d_weight, d_bias, *settings)
    elif d_bias is not None:
        total = d_bias.view(1, -1, *[1] * (len(shape_of(node)) - 2))
    if d_input is None:
        return total
    return added(convolution(d_input, node._saved_weight, None, *settings), total)


@forward_rule("Embedding")
def _embedding(node: Any, tangents: Tangents) -> Tensor | None:
    (table,) = (t for t in tangents if t is not None)
    indices, padding = node._saved_indices, signed(node._saved_padding_idx)
    if node._saved_scale_grad_by_freq:
        table = _by_frequency(table, indices)
    rows = F.embedding(indices, table)
    return rows if padding < 0 else rows.masked_fill((indices == padding).unsqueeze(-1), 0.0)


@forward_rule("EmbeddingBag")
def _bags(node: Any, tangents: Tangents) -> Tensor | None:
    d_table, d_weights = tangents if len(tangents) == 2 else (tangents[0], None)
    mode = int(node._saved_mode)
    if mode == 2:  # the largest
        assert d_table is not None
        where, sizes = node._saved_result3, node._saved_result2
        found = d_table.gather(0, where.clamp(min=0))
        return found.masked_fill((sizes == 0).unsqueeze(-1), 0.0)
    indices, offsets = node._saved_indices, node._saved_offsets
    settings = (signed(node._saved_padding_idx), len(offsets) > shape_of(node)[0])
    total = None
    if d_table is not None:
        if node._saved_scale_grad_by_freq:
            d_table = _by_frequency(d_table, indices)
        weights = node._saved_per_sample_weights
        total = _bagged(d_table, indices, offsets, mode, weights, *settings)
    if d_weights is not None:
        table = node._saved_weight
        total = added(total, _bagged(table, indices, offsets, mode, d_weights, *settings))
    return total


def _bagged(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: int,
    weights: Tensor | None,
    padding: int,
    ends_with_length: bool,
) -> Tensor:
    bag: Any = torch.ops.aten._embedding_bag.default
    found: Tensor = bag(
        table, indices, offsets, False, mode, False, weights, ends_with_length, padding
    )[0]
    return found


def _by_frequency(table: Tensor, indices: Tensor) -> Tensor:
    """The rows, each divided by how often it is looked up."""
    counts = torch.bincount(indices.flatten(), minlength=len(table)).clamp(min=1)
    return table / counts.unsqueeze(-1)


@forward_rule("GridSampler2D", "GridSampler3D")
def _grid_sample(node: Any, tangents: Tangents) -> Tensor | None:
    """Linear in the input; the position of a sample moves each channel by its own gradient."""
    d_input, d_grid = tangents
    flat = node.name().startswith("GridSampler2D")
    operation: Any = torch.ops.aten.grid_sampler_2d if flat else torch.ops.aten.grid_sampler_3d
    modes = (
        node._saved_interpolation_mode,
        node._saved_padding_mode,
        node._saved_align_corners,
    )
    grid = node._saved_grid
    total = None if d_input is None else operation(d_input, grid, *modes)
    if d_grid is None:
        return total
    operation = getattr(torch.ops.aten, f"grid_sampler_{2 if flat else 3}d_backward")
    values = node._saved_input
    count, channels = values.shape[:2]
    ones = values.new_ones(count * channels, 1, *grid.shape[1:-1])
    gradient = operation(
        ones,
        values.flatten(0, 1).unsqueeze(1),
        grid.repeat_interleave(channels, 0),
        *modes,
        [False, True],
    )[1]
    moved = (gradient.unflatten(0, (count, channels)) * d_grid.unsqueeze(1)).sum(-1)
    return added(total, moved)


@forward_rule("Cdist", "CdistForward")
def _distances(node: Any, tangents: Tangents) -> Tensor:
    """Of all pairs (..., P, R), a block of rows at a time: each pair has as many differences."""
    d_left, d_right = tangents
    left, right, distances = node._saved_x1, node._saved_x2, node._saved_result
    rows = max(1, _DIFFERENCES // max(1, distances[..., 0, :].numel() * left.shape[-1]))
    change = torch.zeros_like(distances)
    for start in range(0, distances.shape[-2], rows):
        here = (..., slice(start, start + rows), slice(None))
        moved = added(
            None if d_left is None else d_left[here].unsqueeze(-2),
            None if d_right is None else -d_right.unsqueeze(-3),
        )
        assert moved is not None
        apart = left[here].unsqueeze(-2) - right.unsqueeze(-3)
        change[here] = _lengthened(distances[here], apart, moved, node._saved_p)
    return change


@of_one_input("Pdist", "PdistForward")
def _distances_among(node: Any, change: Tensor) -> Tensor:
    points = node._saved_self
    first, second = torch.triu_indices(len(points), len(points), 1, device=points.device)
    apart, moved = points[first] - points[second], change[first] - change[second]
    return _lengthened(node._saved_result, apart, moved, node._saved_p)


_DIFFERENCES = 2**24


def _lengthened(distance: Tensor, apart: Tensor, moved: Tensor, p: float) -> Tensor:
    """The change of ``norm(apart, p)`` over the last dimension; 0 where that is 0."""
    distance = distance.unsqueeze(-1)
    if p == torch.inf:
        slope = apart.sign() * (apart.abs() == distance)
    else:
        slope = apart.sign() * (apart.abs() / distance) ** (p - 1)
        slope = slope.masked_fill((distance == 0) | (apart == 0), 0.0)
    return (slope * moved).sum(-1)
