"""Changes through products, convolutions, normalisations, lookups, grids, distances, windows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers import CONVOLUTION
from irw_optim.gradients.nodes import base_name, saved, shape_of

from ._tangents import ForwardRule, Tangents, added, again, of_one


def _bilinear(multiply: Any, add: Any, left: str, right: str) -> ForwardRule:
    """``beta * summand + alpha * multiply(left, right)``, or without a summand."""

    def rule(node: Any, tangents: Tangents) -> Tensor | None:
        *summands, d_left, d_right = tangents
        alpha, beta = getattr(node, "_saved_alpha", 1), getattr(node, "_saved_beta", 1)
        total = summands[0] if summands else None
        if total is not None and beta != 1:
            total = total * beta
        products, own = [], None  # to write to
        if d_left is not None:
            products.append((d_left, getattr(node, f"_saved_{right}")))
        if d_right is not None:
            products.append((getattr(node, f"_saved_{left}"), d_right))
        for pair in products:
            if total is not None and total.dtype == pair[0].dtype:
                total = own = add(total, *pair, alpha=alpha, out=own)
            else:
                product = multiply(*pair) if alpha == 1 else multiply(*pair) * alpha
                total = own = product if total is None else total + product
        return total

    return rule


def _convolution(node: Any, tangents: Tangents) -> Tensor | None:
    d_input, d_weight, d_bias = tangents
    settings = [saved(node, name) for name in CONVOLUTION]
    total = None
    if d_weight is not None:
        total = _ATEN.convolution.default(node._saved_input, d_weight, d_bias, *settings)
    elif d_bias is not None:
        total = d_bias.view(1, -1, *[1] * (len(shape_of(node)) - 2))
    if d_input is None:
        return total
    moved: Tensor = _ATEN.convolution.default(d_input, node._saved_weight, None, *settings)
    return moved if total is None else moved.add_(total)  # no new memory


_ONLY_INPUT = [True, False, False]
"""The derivative is symmetric but for the gain behind it: without it, the formula of the backward
pass pushes forwards."""

_ATEN: Any = torch.ops.aten


def _statistics(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    return node._saved_input, node._saved_result1, node._saved_result2


def _layer_norm(node: Any, tangents: Tangents) -> Tensor | None:
    change, d_gain, d_bias = tangents
    x, mean, rstd = _statistics(node)
    if change is not None:
        settings = (saved(node, "normalized_shape"), mean, rstd, None, None, _ONLY_INPUT)
        backward = _ATEN.native_layer_norm_backward.default
        change, weight = backward(change.contiguous(), x, *settings)[0], node._saved_weight
        change = change if weight is None else change * weight
    if d_gain is not None:
        change = added(change, ((x - mean) * rstd).to(d_gain.dtype) * d_gain)
    return added(change, d_bias)


def _group_norm(node: Any, tangents: Tangents) -> Tensor | None:
    change, *changes = tangents
    x, mean, rstd = _statistics(node)
    count, channels, size, groups = (int(saved(node, n)) for n in ("N", "C", "HxW", "group"))
    across = (1, -1, *[1] * (x.ndim - 2))
    d_gain, d_bias = (None if t is None else t.view(across) for t in changes)
    if change is not None:
        settings = (mean, rstd, None, count, channels, size, groups, _ONLY_INPUT)
        backward, weight = _ATEN.native_group_norm_backward.default, node._saved_weight
        change = backward(change.contiguous(), x.contiguous(), *settings)[0]
        change = change if weight is None else change * weight.view(across)
    if d_gain is not None:
        grouped = x.reshape(count, groups, -1)
        normal = ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).view(x.shape)
        change = added(change, normal.to(d_gain.dtype) * d_gain)
    return added(change, d_bias)


def _batch_norm(node: Any, tangents: Tangents) -> Tensor | None:
    d_input, d_gain, d_bias = tangents
    eps = saved(node, "eps" if hasattr(node, "_saved_eps") else "epsilon")
    running = node._saved_running_mean, node._saved_running_var
    (x, mean, rstd), training, change = _statistics(node), node._saved_training, None
    if d_input is not None:  # the gain is one for each statistic
        settings = (node._saved_weight, *running, mean, rstd, training, eps, _ONLY_INPUT)
        change = _ATEN.native_batch_norm_backward.default(d_input, x, *settings)[0]
    if d_gain is None:
        return added(change, None if d_bias is None else d_bias.view(1, -1, *[1] * (x.ndim - 2)))
    if training:
        running, eps = (mean, rstd**-2), 0.0
    moved: Tensor = torch.native_batch_norm(x, d_gain, d_bias, *running, False, 0.0, eps)[0]
    return moved if change is None else moved.add_(change)


def _weight_norm(node: Any, tangents: Tangents) -> Tensor | None:
    """Of g v / |v|."""
    d_direction, d_length = tangents
    direction, length, norm = node._saved_v, node._saved_g, node._saved_result1
    unit = direction / norm
    total = None if d_length is None else unit * d_length
    if d_direction is None:
        return total
    dim = saved(node, "dim") % unit.ndim
    along = (unit * d_direction).sum([d for d in range(unit.ndim) if d != dim], keepdim=True)
    return added(total, torch.addcmul(d_direction, unit, along, value=-1) * (length / norm))


def _embedding(node: Any, table: Tensor) -> Tensor:
    indices, padding = node._saved_indices, saved(node, "padding_idx")
    if node._saved_scale_grad_by_freq:
        table = _by_frequency(table, indices)
    rows = F.embedding(indices, table)
    return rows if padding < 0 else rows.masked_fill((indices == padding).unsqueeze(-1), 0.0)


def _bags(node: Any, tangents: Tangents) -> Tensor | None:
    d_table, d_weights = (*tangents, None)[:2]
    mode = int(node._saved_mode)
    if mode == 2 and d_table is not None:  # the largest
        where, sizes = node._saved_result3, node._saved_result2
        found = d_table.gather(0, where.clamp(min=0))
        return found.masked_fill((sizes == 0).unsqueeze(-1), 0.0)
    indices, offsets = node._saved_indices, node._saved_offsets
    padding, ends_with_length = saved(node, "padding_idx"), len(offsets) > shape_of(node)[0]

    def bagged(table: Tensor, weights: Tensor | None) -> Tensor:
        settings = (mode, False, weights, ends_with_length, padding)
        return _ATEN._embedding_bag.default(table, indices, offsets, False, *settings)[0]  # type: ignore[no-any-return]

    total = None
    if d_table is not None:
        if node._saved_scale_grad_by_freq:
            d_table = _by_frequency(d_table, indices)
        total = bagged(d_table, node._saved_per_sample_weights)
    return total if d_weights is None else added(total, bagged(node._saved_weight, d_weights))


def _by_frequency(table: Tensor, indices: Tensor) -> Tensor:
    counts = torch.bincount(indices.flatten(), minlength=len(table)).clamp(min=1)
    return table / counts.unsqueeze(-1)


def _grid_sample(node: Any, tangents: Tangents) -> Tensor | None:
    """A moving position changes each channel by its own gradient there."""
    d_input, d_grid = tangents
    name = f"grid_sampler_{base_name(node)[-2:].lower()}"
    modes = [saved(node, n) for n in ("interpolation_mode", "padding_mode", "align_corners")]
    grid = node._saved_grid
    total = None if d_input is None else getattr(_ATEN, name)(d_input, grid, *modes)
    if d_grid is None:
        return total
    values = node._saved_input
    count, channels = values.shape[:2]
    ones = values.new_ones(count * channels, 1, *grid.shape[1:-1])
    values, grids = values.flatten(0, 1).unsqueeze(1), grid.repeat_interleave(channels, 0)
    gradient = getattr(_ATEN, f"{name}_backward")(ones, values, grids, *modes, [False, True])[1]
    moved = (gradient.unflatten(0, (count, channels)) * d_grid.unsqueeze(1)).sum(-1)
    return added(total, moved)


def _distances(node: Any, tangents: Tangents) -> Tensor:
    """Of all pairs, (..., P, R), some rows at a time."""
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


def _distances_among(node: Any, change: Tensor) -> Tensor:
    points = node._saved_self
    first, second = torch.triu_indices(len(points), len(points), 1, device=points.device)
    apart, moved = points[first] - points[second], change[first] - change[second]
    return _lengthened(node._saved_result, apart, moved, node._saved_p)


_DIFFERENCES = 2**24


def _lengthened(distance: Tensor, apart: Tensor, moved: Tensor, p: float) -> Tensor:
    """The change of ``norm(apart, p)`` over the last dimension."""
    distance = distance.unsqueeze(-1)
    if p == torch.inf:
        slope = apart.sign() * (apart.abs() == distance)
    else:
        slope = apart.sign() * (apart.abs() / distance) ** (p - 1)
        slope = slope.masked_fill((distance == 0) | (apart == 0), 0.0)
    return (slope * moved).sum(-1)


_WINDOWS = "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"


def _largest_in_windows(node: Any, change: Tensor) -> Tensor:
    where = node._saved_result1
    return change.flatten(-2).gather(-1, where.flatten(-2)).view(where.shape)


RULES: dict[str, ForwardRule] = {
    "AvgPool2D": again(_ATEN.avg_pool2d.default, *_WINDOWS),
    "MaxPool2DWithIndices": of_one(_largest_in_windows),
    "ChannelShuffle": again(F.channel_shuffle, "groups"),
    "PixelShuffle": again(F.pixel_shuffle, "upscale_factor"),
    "ViewAsComplex": of_one(lambda node, t: torch.view_as_complex(t.contiguous())),
    "ViewAsReal": of_one(lambda node, t: torch.view_as_real(t.resolve_conj())),
    "Im2Col": again(F.unfold, "kernel_size", "dilation", "padding", "stride"),
    "Mm": _bilinear(torch.mm, torch.addmm, "self", "mat2"),
    "Bmm": _bilinear(torch.bmm, torch.baddbmm, "self", "mat2"),
    "Mv": _bilinear(torch.mv, torch.addmv, "self", "vec"),
    "Addmm": _bilinear(torch.mm, torch.addmm, "mat1", "mat2"),
    "Baddbmm": _bilinear(torch.bmm, torch.baddbmm, "batch1", "batch2"),
    "Addmv": _bilinear(torch.mv, torch.addmv, "mat", "vec"),
    "Convolution ConvolutionOverrideable": _convolution,
    "NativeLayerNorm": _layer_norm,
    "NativeGroupNorm": _group_norm,
    "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm": _batch_norm,
    "WeightNormInterface": _weight_norm,
    "Embedding": of_one(_embedding),
    "EmbeddingBag": _bags,
    "GridSampler2D GridSampler3D": _grid_sample,
    "Cdist": _distances,
    "Pdist": of_one(_distances_among),
}
