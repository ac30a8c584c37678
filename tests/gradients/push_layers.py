"""Layers and losses, for `test_pushforward`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pushes import Case, case, in_single
from torch import Tensor, nn

IMAGE, LINE, VOLUME = (2, 4, 6, 6), (2, 4, 7), (1, 2, 4, 4, 4)


def module(name: str, make: Callable[[], nn.Module], *shapes: Any, **settings: Any) -> Case:
    return case(name, lambda layer, *inputs: layer(*inputs), make, *shapes, **settings)


_NAMES = """celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish
relu relu6 selu silu softplus softshrink softsign tanhshrink"""

ACTIVATIONS = [case(name, getattr(F, name), (3, 4)) for name in _NAMES.split()]
ACTIVATIONS += [
    case("gelu tanh", partial(F.gelu, approximate="tanh"), (3, 4)),
    case("threshold", lambda x: F.threshold(x, 0.1, 20.0), (3, 4)),
    case("prelu", F.prelu, (2, 3, 4), (3,)),
    case("prelu 1", F.prelu, (2, 3, 4), (1,)),
    case("rrelu", lambda x: (F.rrelu(x, training=True), F.rrelu(x)), (3, 4)),
    case("in place", lambda x: F.silu(F.relu(x + 1, inplace=True) * 2, inplace=True), (3, 4)),
    case("gumbel", lambda x: (F.gumbel_softmax(x), F.gumbel_softmax(x, hard=True)), (3, 4)),
    case("softmin", lambda x: (F.softmin(x, 1), F.softmax(x, 0), F.log_softmax(x, 0)), (3, 4)),
    case("dropout", lambda x: (F.dropout(x), F.alpha_dropout(x, training=True)), (3, 4)),
    case(
        "dropout of maps",
        lambda x: (
            F.dropout2d(x),
            F.dropout1d(x[0]),
            F.dropout3d(x[None]),
            F.feature_alpha_dropout(x, training=True),
        ),
        IMAGE,
    ),
    case("dropout with its mask", lambda x: torch.native_dropout(x, 0.5, True)[0], (3, 4)),
    case("dropout once", lambda x: F.dropout(x, 0.0) + F.dropout(x, 0.3, training=False), (3, 4)),
]

CONVOLUTIONS = [
    case(
        "conv1d",
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1, dilation=2),
        LINE,
        (3, 4, 2),
        (3,),
    ),
    case(
        "conv2d",
        lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 0)),
        IMAGE,
        (3, 4, 2, 3),
        (3,),
    ),
    case("conv2d grouped", lambda x, w: F.conv2d(x, w, groups=2, dilation=2), IMAGE, (4, 2, 2, 2)),
    case(
        "conv2d depthwise", lambda x, w, b: F.conv2d(x, w, b, groups=4), IMAGE, (8, 1, 3, 3), (8,)
    ),
    case("conv2d same", lambda x, w: F.conv2d(x, w, padding="same"), IMAGE, (2, 4, 3, 3)),
    case("conv2d unbatched", F.conv2d, (4, 5, 5), (2, 4, 3, 3), (2,)),
    case(
        "conv2d channels last",
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w),
        IMAGE,
        (3, 4, 3, 3),
    ),
    case("conv3d", partial(F.conv3d, padding=1), VOLUME, (2, 2, 3, 3, 3), (2,)),
    case(
        "transposed 1d",
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=3, padding=1, output_padding=2),
        LINE,
        (4, 2, 3),
        (2,),
    ),
    case(
        "transposed 2d",
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, groups=2, dilation=2),
        (1, 4, 3, 3),
        (4, 1, 2, 2),
        (2,),
    ),
    case("transposed 3d", F.conv_transpose3d, (1, 2, 2, 2, 2), (2, 3, 2, 2, 2)),
    in_single("conv2d float32", partial(F.conv2d, padding=1), IMAGE, (3, 4, 3, 3), (3,)),
    in_single(
        "conv2d float32 channels last",
        lambda x, w, b: F.conv2d(x.to(memory_format=torch.channels_last), w, b, groups=4),
        IMAGE,
        (4, 1, 3, 3),
        (4,),
    ),
    module(
        "circular", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 4)
    ),
    module("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (2, 4)),
    module(
        "spectral norm",
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
        (2, 4),
    ),
    case("unfold", lambda x: F.unfold(x, 2, dilation=2, padding=1, stride=2), IMAGE),
    case("fold", lambda x: F.fold(x, (4, 4), 2, stride=2), (2, 8, 4)),
]

POOLS = [
    case("max 1d", lambda x: (F.max_pool1d(x, 3, 2, 1), F.max_pool1d(x, 2, ceil_mode=True)), LINE),
    case("max 2d", lambda x: (F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x[0], 2, dilation=2)), IMAGE),
    case(
        "max 2d channels last",
        lambda x: F.max_pool2d(x.to(memory_format=torch.channels_last), 2),
        IMAGE,
    ),
    case("max 3d", lambda x: F.max_pool3d(x, 2), VOLUME),
    case("average 1d", lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), LINE),
    case(
        "average 2d",
        lambda x: (F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 2, divisor_override=3)),
        IMAGE,
    ),
    case("average 3d", lambda x: F.avg_pool3d(x, 2), VOLUME),
    case("power", lambda x: F.lp_pool2d(x.exp(), 3, 2) + F.lp_pool2d(x.abs(), 2, 2), IMAGE),
    case("adaptive 1d", lambda x: (F.adaptive_avg_pool1d(x, 3), F.adaptive_max_pool1d(x, 3)), LINE),
    case(
        "adaptive 2d",
        lambda x: (
            F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool2d(x, (4, 3)),
            F.adaptive_max_pool2d(x, 4),
        ),
        IMAGE,
    ),
    case(
        "adaptive 3d",
        lambda x: (
            F.adaptive_avg_pool3d(x, 1),
            F.adaptive_avg_pool3d(x, 3),
            F.adaptive_max_pool3d(x, 2),
        ),
        VOLUME,
    ),
    case("fractional", lambda x: F.fractional_max_pool2d(x, 2, output_size=3), IMAGE),
    case("fractional 3d", lambda x: F.fractional_max_pool3d(x, 2, output_size=2), VOLUME),
    case("unpool", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), IMAGE),
    case(
        "unpool 3d", lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2), VOLUME
    ),
]


def _grid(x: Tensor, grid: Tensor) -> list[Tensor]:
    return [
        F.grid_sample(x, grid * 0.8, mode, pads, align_corners=corners)
        for mode in (("bilinear", "bicubic", "nearest") if x.ndim == 4 else ("bilinear",))
        for pads in ("zeros", "border", "reflection")
        for corners in (False, True)
    ]


def _resized(x: Tensor) -> list[Tensor]:
    modes = {3: ("linear",), 4: ("bilinear", "bicubic"), 5: ("trilinear",)}[x.ndim]
    found = [
        F.interpolate(x, scale_factor=1.5, mode=m) for m in ("nearest", "nearest-exact", "area")
    ]
    return found + [
        F.interpolate(x, scale_factor=s, mode=m, align_corners=c)
        for m in modes
        for s, c in ((1.5, True), (0.7, False))
    ]


RESIZED = [
    case("resized 1d", _resized, (2, 2, 4)),
    case("resized 2d", _resized, (1, 2, 4, 4)),
    case("resized 3d", _resized, (1, 1, 3, 3, 3)),
    case("antialias", lambda x: F.interpolate(x, 3, mode="bilinear", antialias=True), (1, 2, 6, 6)),
    case(
        "antialias cubic",
        lambda x: F.interpolate(x, 3, mode="bicubic", antialias=True),
        (1, 2, 6, 6),
    ),
    case(
        "shuffled",
        lambda x: (F.pixel_shuffle(x, 2), F.pixel_unshuffle(x, 2), F.channel_shuffle(x, 2)),
        IMAGE,
    ),
    *[
        case(f"pad {mode} {len(s) - 2}d", lambda x, m=mode: F.pad(x, (1, 1) * (x.ndim - 2), m), s)
        for mode in ("reflect", "replicate", "circular")
        for s in ((1, 2, 4), (1, 2, 4, 3), (1, 1, 3, 3, 3))
    ],
    case("grid", _grid, (2, 3, 3, 3), (2, 2, 2, 2)),
    case("grid 3d", _grid, (1, 2, 2, 3, 2), (1, 2, 2, 1, 3)),
    case("affine grid", lambda t: F.affine_grid(t, [2, 1, 3, 3], align_corners=False), (2, 2, 3)),
]

NORMS = [
    *[
        module(f"{name} {mode}", lambda make=make, mode=mode: make().train(mode == "train"), shape)
        for name, make, shape in (
            ("batch 1d", lambda: nn.BatchNorm1d(4), (5, 4)),
            ("batch 2d", lambda: nn.BatchNorm2d(4), IMAGE),
            ("batch 3d", lambda: nn.BatchNorm3d(2), VOLUME),
            ("batch plain", lambda: nn.BatchNorm1d(4, affine=False), LINE),
            ("batch untracked", lambda: nn.BatchNorm1d(4, track_running_stats=False), LINE),
            ("instance", lambda: nn.InstanceNorm2d(4), IMAGE),
            (
                "instance tracked",
                lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
                LINE,
            ),
        )
        for mode in ("train", "eval")
    ],
    module("batch exact eval", lambda: nn.BatchNorm1d(4, eps=0.0).eval(), LINE),
    case(
        "batch channels last",
        lambda x, w, b: F.batch_norm(
            x.to(memory_format=torch.channels_last), None, None, w, b, training=True
        ),
        IMAGE,
        (4,),
        (4,),
    ),
    case(
        "batch strided",
        lambda x, w, b: F.batch_norm(x.transpose(0, 1)[:, :4], None, None, w, b, training=True),
        (5, 3, 2),
        (4,),
        (4,),
    ),
    case(
        "batch gain alone",
        lambda x, w: F.batch_norm(x, torch.zeros(4), torch.ones(4), w.float(), training=False),
        LINE,
        (4,),
        dtype=torch.float32,
        tolerance=1e-4,
    ),
    case("layer", lambda x, w, b: F.layer_norm(x, (3, 4), w, b), (2, 3, 4), (3, 4), (3, 4)),
    case("layer plain", lambda x: F.layer_norm(x.mT, (3,)), (2, 3, 4)),
    case("layer gain", lambda x, w: F.layer_norm(x, (4,), w), (2, 3, 4), (4,)),
    case("group", lambda x, w, b: F.group_norm(x, 2, w, b), IMAGE, (4,), (4,)),
    case("group plain", lambda x: F.group_norm(x.to(memory_format=torch.channels_last), 2), IMAGE),
    case("group gain", lambda x, w: F.group_norm(x, 2, w), LINE, (4,)),
    case("rms", lambda x, w: (F.rms_norm(x, (4,), w), F.rms_norm(x, (4,))), (2, 3, 4), (4,)),
    case("local response", lambda x: F.local_response_norm(x, 2), IMAGE),
]

LAYERS = [*ACTIVATIONS, *CONVOLUTIONS, *POOLS, *RESIZED, *NORMS]
