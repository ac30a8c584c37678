"""Changes through normalisations.

The derivative by the input is symmetric but for the gain behind it: the formula of the backward
pass, without the gain, pushes forwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.forward._registry import Tangents, added, forward_rule
from irw_optim.gradients.nodes import signed

_ONLY_INPUT = [True, False, False]


@forward_rule("NativeLayerNorm")
def _layer_norm(node: Any, tangents: Tangents) -> Tensor | None:
    d_input, d_gain, d_bias = tangents
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    shape = [signed(n) for n in node._saved_normalized_shape]
    change = None
    if d_input is not None:
        backward: Any = torch.ops.aten.native_layer_norm_backward.default
        settings = (shape, mean, rstd, None, None, _ONLY_INPUT)
        change = backward(d_input.contiguous(), x, *settings)[0]
        weight = node._saved_weight
        change = change if weight is None else change * weight
    if d_gain is not None:
        change = added(change, ((x - mean) * rstd).to(d_gain.dtype) * d_gain)
    return added(change, d_bias)


@forward_rule("NativeGroupNorm")
def _group_norm(node: Any, tangents: Tangents) -> Tensor | None:
    d_input, d_gain, d_bias = tangents
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    count, groups = int(node._saved_N), int(node._saved_group)
    settings = (count, int(node._saved_C), int(node._saved_HxW), groups, _ONLY_INPUT)
    across = (1, -1, *[1] * (x.ndim - 2))
    change = None
    if d_input is not None:
        backward: Any = torch.ops.aten.native_group_norm_backward.default
        change = backward(d_input.contiguous(), x.contiguous(), mean, rstd, None, *settings)[0]
        weight = node._saved_weight
        change = change if weight is None else change * weight.view(across)
    if d_gain is not None:
        grouped = x.reshape(count, groups, -1)
        normal = ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).view(x.shape)
        change = added(change, normal.to(d_gain.dtype) * d_gain.view(across))
    return added(change, None if d_bias is None else d_bias.view(across))


@forward_rule("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
def _batch_norm(node: Any, tangents: Tangents) -> Tensor | None:
    d_input, d_gain, d_bias = tangents
    training = node._saved_training
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    running_mean, running_variance = node._saved_running_mean, node._saved_running_var
    mean, rstd = node._saved_result1, node._saved_result2
    x = node._saved_input
    across = (1, -1, *[1] * (x.ndim - 2))
    change = None
    if d_input is not None:  # the gain is the same for all that a statistic is taken of
        backward: Any = torch.ops.aten.native_batch_norm_backward.default
        weight = node._saved_weight
        settings = (running_mean, running_variance, mean, rstd, training, eps, _ONLY_INPUT)
        change = backward(d_input, x, weight, *settings)[0]
    if d_gain is None:
        return added(change, None if d_bias is None else d_bias.view(across))
    if not training:
        mean, rstd = running_mean, (running_variance + eps).rsqrt()
    scale = d_gain * rstd
    shift = -mean * scale if d_bias is None else d_bias - mean * scale
    moved = shift.view(across) if change is None else change.add_(shift.view(across))
    return torch.addcmul(moved, x, scale.view(across))
