"""Autograd's operations by name, each with what it does to the batch.

What is not in this list is taken to mix the samples: a graph with it is compared with autograd at
every step.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from irw_optim.gradients import mixing_rules as rules
from irw_optim.gradients.nodes import Rule, base_name

_NAMES: dict[Rule, str] = {
    rules.elementwise: (
        "Abs Acos Acosh Add Addcdiv Addcmul Angle Asin Asinh Atan Atan2 Atanh Bernoulli Celu Ceil "
        "Clamp ClampMax ClampMin Clone Complex Conj ConjPhysical Copysign Cos Cosh Digamma Div "
        "Elu Erf Erfc Erfinv Exp Exp2 Expand Expm1 Fill Floor Fmax Fmin Fmod Frac Gelu Hardshrink "
        "Hardsigmoid Hardswish Hardtanh Heaviside Hypot Imag LeakyRelu Lerp Lgamma Log Log10 "
        "Log1P Log2 LogSigmoid Logaddexp Logit MaskedFill Maximum Minimum Mish Mul NanToNum "
        "NativeDropout Neg Polar Pow PreluKernel Real Reciprocal Relu Relu6 Remainder Round "
        "RreluWithNoise Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink Sqrt "
        "Sub Tan Tanh Threshold ToCopy Trunc Where Xlog1Py Xlogy"
    ),
    rules.unreduced: (
        "BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss "
        "SoftMarginLoss"
    ),
    rules.of_classes: "NllLoss NllLoss2D",
    rules.of_rows(0): "MultiMarginLoss MultilabelMarginLoss",
    rules.of_rows(1): "CtcLoss",
    rules.reshaped: "Alias LiftFresh ReshapeAlias Squeeze UnsafeView Unsqueeze View Detach",
    rules.along("_saved_dim"): (
        "Cat Cummax Cummin Cumprod Cumsum FftC2C FftC2R FftR2C Gather Glu IndexAdd IndexSelect "
        "LogSoftmax Logcumsumexp SafeSoftmax Scatter ScatterAdd Softmax Sort Split SplitWithSizes "
        "Topk UnsafeSplit UnsafeSplitWithSizes"
    ),
    rules.sliced: "Slice",
    rules.along("_saved_dims"): "Flip Roll",
    rules.reducing: (
        "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Norm Prod Std Sum "
        "Var"
    ),
    rules.inserting: "Stack",
    rules.removing: "Select Unbind",
    rules.swapping: "T Transpose",
    rules.permuting: "Permute",
    rules.multiplying: "Addmm Baddbmm Bmm Mm",
    rules.linear: "Linear MkldnnLinear",
    rules.with_weights(): "Col2Im Convolution ConvolutionOverrideable Im2Col Mv NativeGroupNorm",
    rules.layer_norm: "NativeLayerNorm FusedRmsNorm",
    rules.batch_norm: "CudnnBatchNorm MiopenBatchNorm NativeBatchNorm",
    rules.of_shared_tables: "Embedding EmbeddingBag",
    rules.along_last(1): (
        "AdaptiveMaxPool1D AvgPool1D MaxPool1D ReflectionPad1D ReplicationPad1D UpsampleLinear1D "
        "UpsampleNearest1D"
    ),
    rules.along_last(2): (
        "AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices "
        "ReflectionPad2D ReplicationPad2D ScaledDotProductAttentionMath "
        "ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention "
        "ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu "
        "ScaledDotProductFusedAttentionOverrideable "
        "Tril Triu UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest2D"
    ),
    rules.along_last(3): (
        "AdaptiveAvgPool3D AdaptiveMaxPool3D AvgPool3D MaxPool3DWithIndices PixelShuffle "
        "PixelUnshuffle ReflectionPad3D ReplicationPad3D UpsampleNearest3D UpsampleTrilinear3D"
    ),
    rules.padding: "ConstantPadNd",
    rules.repeating: "Repeat",
    rules.strided: "AsStrided",
    rules.picking: "Index",
    rules.recurrent: "MkldnnRnnLayer",
}

RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}

_SETTINGS = "dim dim0 dim1 dims keepdim normalized_shape pad reduction repeats size stride training"
"""All that a rule reads beside the shapes and, of indices, what `picks_of` says."""


_RULE_OF: dict[type[Node], Rule] = {}

SETTINGS_OF: dict[type[Node], Callable[[Any], object] | None] = {}
"""How to read what the rule of a node looks at, beside the shapes; None for nothing."""


def rule_for(node: Node) -> Rule:
    """The rule of a node, by its name without what numbers its variants: ``MeanBackward1``."""
    rule = _RULE_OF.get(type(node))
    if rule is None:
        rule = RULES.get(base_name(node), rules.mixing)
        if isinstance(node, BackwardCFunction):  # a function in Python may have any name
            rule = rules.handed_on if _is_torchs_identity(node) else rules.mixing
        _RULE_OF[type(node)] = rule
    return rule


def is_known(node: Node) -> bool:
    """Whether a node has a rule."""
    return rule_for(node) is not rules.mixing


def is_view(node: Node) -> bool:
    """Whether a node hands on numbers as they are."""
    return rule_for(node) in (rules.permuting, rules.removing, rules.reshaped, rules.swapping)


def settings_of(node: Node) -> object:
    """What the rule of a node looks at, of a kind that `SETTINGS_OF` did not know until now."""
    saved = [f"_saved_{name}" for name in _SETTINGS.split()]
    names = [name for name in saved if hasattr(node, name)]
    read: Callable[[Any], object] | None = None
    if rule_for(node) is rules.picking:
        read = rules.picks_of
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
