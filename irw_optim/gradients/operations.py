"""Autograd's operations by name, each with what it does to the batch.

What is not in this list is taken to mix the samples: a graph with it is compared with autograd at
every step.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from irw_optim.gradients.mixing_rules import (
    along,
    along_last,
    batch_norm,
    elementwise,
    handed_on,
    inserting,
    layer_norm,
    linear,
    matrix_by_vector,
    mixing,
    multiplying,
    of_classes,
    of_rows,
    of_shared_tables,
    padding,
    permuting,
    picking,
    picks_of,
    recurrent,
    reducing,
    removing,
    repeating,
    reshaped,
    sliced,
    strided,
    swapping,
    unreduced,
    with_weights,
)
from irw_optim.gradients.nodes import base_name
from irw_optim.gradients.place import Rule


class _Named(NamedTuple):
    rule: Rule
    names: str


_NAMED = (
    _Named(
        elementwise,
        "Abs Acos Acosh Add Addcdiv Addcmul Angle Asin Asinh Atan Atan2 Atanh Bernoulli Celu Ceil "
        "Clamp ClampMax ClampMin Clone Complex Conj ConjPhysical Copysign Cos Cosh Digamma Div "
        "Elu Erf Erfc Erfinv Exp Exp2 Expand Expm1 Fill Floor Fmax Fmin Fmod Frac Gelu Hardshrink "
        "Hardsigmoid Hardswish Hardtanh Heaviside Hypot Imag LeakyRelu Lerp Lgamma Log Log10 "
        "Log1P Log2 LogSigmoid Logaddexp Logit MaskedFill Maximum Minimum Mish Mul NanToNum "
        "NativeDropout Neg Polar Pow PreluKernel Real Reciprocal Relu Relu6 Remainder Round "
        "RreluWithNoise Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink Sqrt "
        "Sub Tan Tanh Threshold ToCopy Trunc Where Xlog1Py Xlogy",
    ),
    _Named(
        unreduced,
        "BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss "
        "SoftMarginLoss",
    ),
    _Named(of_classes, "NllLoss NllLoss2D"),
    _Named(of_rows(0), "MultiMarginLoss MultilabelMarginLoss"),
    _Named(of_rows(1), "CtcLoss"),
    _Named(
        reshaped,
        "Alias LiftFresh ReshapeAlias Squeeze UnsafeView Unsqueeze View Detach",
    ),
    _Named(
        along("_saved_dim"),
        "Cat Cummax Cummin Cumprod Cumsum FftC2C FftC2R FftR2C Gather Glu IndexAdd IndexSelect "
        "LogSoftmax Logcumsumexp SafeSoftmax Scatter ScatterAdd Softmax Sort Split SplitWithSizes "
        "Topk UnsafeSplit UnsafeSplitWithSizes",
    ),
    _Named(sliced, "Slice"),
    _Named(along("_saved_dims"), "Flip Roll"),
    _Named(
        reducing,
        "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Norm Prod Std Sum "
        "Var",
    ),
    _Named(inserting, "Stack"),
    _Named(removing, "Select Unbind"),
    _Named(swapping, "T Transpose"),
    _Named(permuting, "Permute"),
    _Named(multiplying, "Addmm Baddbmm Bmm Mm"),
    _Named(matrix_by_vector, "Mv"),
    _Named(linear, "Linear MkldnnLinear"),
    _Named(with_weights(), "Col2Im Convolution ConvolutionOverrideable Im2Col NativeGroupNorm"),
    _Named(layer_norm, "NativeLayerNorm FusedRmsNorm"),
    _Named(batch_norm, "CudnnBatchNorm MiopenBatchNorm NativeBatchNorm"),
    _Named(of_shared_tables, "Embedding EmbeddingBag"),
    _Named(
        along_last(1),
        "AdaptiveMaxPool1D AvgPool1D MaxPool1D ReflectionPad1D ReplicationPad1D UpsampleLinear1D "
        "UpsampleNearest1D",
    ),
    _Named(
        along_last(2),
        "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices "
        "ReflectionPad2D ReplicationPad2D ScaledDotProductAttentionMath "
        "ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention "
        "ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu "
        "ScaledDotProductFusedAttentionOverrideable "
        "Tril Triu UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest2D",
    ),
    _Named(
        along_last(3),
        "AdaptiveAvgPool3D AdaptiveMaxPool3D AvgPool3D MaxPool3DWithIndices PixelShuffle "
        "PixelUnshuffle ReflectionPad3D ReplicationPad3D UpsampleNearest3D UpsampleTrilinear3D",
    ),
    _Named(padding, "ConstantPadNd"),
    _Named(repeating, "Repeat"),
    _Named(strided, "AsStrided"),
    _Named(picking, "Index"),
    _Named(recurrent, "MkldnnRnnLayer"),
)

RULES: dict[str, Rule] = {name: named.rule for named in _NAMED for name in named.names.split()}

_SETTINGS = (
    "_saved_dim",
    "_saved_dim0",
    "_saved_dim1",
    "_saved_dims",
    "_saved_keepdim",
    "_saved_normalized_shape",
    "_saved_pad",
    "_saved_reduction",
    "_saved_repeats",
    "_saved_size",
    "_saved_stride",
    "_saved_training",
)
"""All that a rule reads beside the shapes and, of indices, what `picks_of` says."""


_RULE_OF: dict[type[Node], Rule] = {}

SETTINGS_OF: dict[type[Node], Callable[[Any], object] | None] = {}
"""How to read what the rule of a node looks at, beside the shapes; None for nothing."""


def rule_for(node: Node) -> Rule:
    """The rule of a node, by its name without what numbers its variants: ``MeanBackward1``."""
    rule = _RULE_OF.get(type(node))
    if rule is None:
        rule = RULES.get(base_name(node), mixing)
        if isinstance(node, BackwardCFunction):  # a function in Python may have any name
            rule = handed_on if _is_torchs_identity(node) else mixing
        _RULE_OF[type(node)] = rule
    return rule


def is_known(node: Node) -> bool:
    """Whether a node has a rule."""
    return rule_for(node) is not mixing


def is_view(node: Node) -> bool:
    """Whether a node hands on numbers as they are."""
    return rule_for(node) in (permuting, removing, reshaped, swapping)


def settings_of(node: Node) -> object:
    """What the rule of a node looks at, of a kind that `SETTINGS_OF` did not know until now."""
    names = [name for name in _SETTINGS if hasattr(node, name)]
    read: Callable[[Any], object] | None = None
    if rule_for(node) is picking:
        read = picks_of
    elif names:
        values = attrgetter(*names)
        lists = any(isinstance(getattr(node, name), list) for name in names)
        read = (lambda n: repr(values(n))) if lists else values
    SETTINGS_OF[type(node)] = read
    return None if read is None else read(node)


def _is_torchs_identity(node: BackwardCFunction) -> bool:
    """Functions by which torch hears a pass: module hooks, FSDP, DistributedDataParallel."""
    function = getattr(node, "_forward_cls", type(node))
    names = ("BackwardHookFunction", "RegisterPostBackwardFunction", "_DDPSink")
    return function.__module__.startswith("torch.") and function.__name__ in names
