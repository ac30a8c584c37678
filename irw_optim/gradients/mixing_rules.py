"""How operations move the batch: from its place in the output to that in each input.

A rule answers with a stride or `SHARED`, or raises `MixesError`: such a graph is compared at every
step.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from .nodes import SHARED, UNREAD, MixesError, Output, Rule, is_block, mixes, picks_of


def elementwise(output: Output) -> Sequence[int]:
    """Inputs broadcast to the output."""
    return [
        output.stride if tuple(shape) == tuple(output.shape) else output.broadcast(shape)
        for shape in output.inputs
    ]


def unreduced(output: Output) -> Sequence[int]:
    """A loss of every element."""
    return mixes() if output.node._saved_reduction else elementwise(output)


def reshaped(output: Output) -> Sequence[int]:
    """The same numbers in the same order."""
    return [output.stride] * len(output.inputs)


def _along(name: str) -> Rule:
    return lambda output: output.all_at(output.beside(output.saved_dims(name)))


def _in_blocks(output: Output) -> Sequence[int]:
    """Along the batch, if in blocks that have all samples."""
    (dim,), read = output.saved_dims(), output.inputs
    if output.dim != dim:
        return output.all_at(output.dim)
    sizes = [shape[dim] if shape else 1 for shape in read]
    sizes += [made.shape[dim] for made in output.node._input_metadata[: output.number]]
    if hasattr(output.node, "_saved_start") and sizes != [output.shape[dim]]:
        sizes.append(output.shape[dim] if is_block(output.node) else 1)
    once = (output.located or mixes())[1] * output.batch_size
    if any(size % once for size in sizes):
        raise MixesError
    return [UNREAD if 0 in shape else output.stride for shape in read]


def _along_last(count: int) -> Rule:
    def rule(output: Output) -> Sequence[int]:
        ndim = len(output.shape)
        return output.all_at(output.beside(range(ndim - count, ndim)))

    return rule


def _reducing(output: Output) -> Sequence[int]:
    ndim = len(output.inputs[0])
    dims = output.saved_dims(ndim=ndim)
    if getattr(output.node, "_saved_keepdim", False):
        return output.all_at(output.beside(dims))
    left = [d for d in range(ndim) if d not in dims]
    return output.all_at(left[output.beside(range(len(left), len(output.shape)))])


def _inserting(output: Output) -> Sequence[int]:
    (new,) = output.saved_dims()
    dim = output.beside([new])
    return output.all_at(dim - (dim > new))


def removing(output: Output) -> Sequence[int]:
    """The output has a dimension less."""
    (gone,) = output.saved_dims(ndim=len(output.shape) + 1)
    return output.all_at(output.dim + (output.dim >= gone))


def _windowed(output: Output) -> Sequence[int]:
    last = len(output.shape) - 1
    return output.all_at(output.beside([*output.saved_dims("_saved_dimension", last), last]))


def swapping(output: Output) -> Sequence[int]:
    """Two dimensions change places."""
    names = [n for n in ("_saved_dim0", "_saved_dim1") if hasattr(output.node, n)]
    last = len(output.shape) - 1
    a, b = [d for n in names for d in output.saved_dims(n)] if names else (0, last)
    return output.all_at({a: b, b: a}.get(output.dim, output.dim))


def permuting(output: Output) -> Sequence[int]:
    """All dimensions change places."""
    return output.all_at(output.saved_dims("_saved_dims")[output.dim])


def _multiplying(output: Output) -> Sequence[int]:
    dim, rows = output.dim, len(output.shape) - 2
    *summand, left, right = output.inputs
    return [
        *map(output.broadcast, summand),
        output.at(left, dim) if dim <= rows else SHARED,
        output.at(right, dim) if dim != rows else SHARED,
    ]


def _with_weights(leading: Callable[[Output], int]) -> Rule:
    """The first input holds the batch in front; weights follow."""

    def rule(output: Output) -> Sequence[int]:
        shape, *weights = output.inputs
        dim = output.beside(range(leading(output), len(output.shape)))
        return [output.at(shape, dim), *[SHARED] * len(weights)]

    return rule


def _batch_norm(output: Output) -> Sequence[int]:
    """In channels, as in an instance norm, nothing mixes."""
    in_channels = output.dim == 1  # each sample has its own copy of the weights
    if output.node._saved_training and not in_channels:
        raise MixesError
    shape, *weights = output.inputs
    of_weights = [output.at(w, 0) if in_channels else SHARED for w in weights]
    return [output.at(shape, output.dim), *of_weights]


def _of_classes(output: Output) -> Sequence[int]:
    dim = mixes() if output.node._saved_reduction else output.dim
    return output.all_at(dim + (dim >= 1))


def _of_rows(dim: int) -> Rule:
    """Losses that read the batch in this dimension."""

    def rule(output: Output) -> Sequence[int]:
        reduced = getattr(output.node, "_saved_reduction", 0)
        return mixes() if reduced or output.located != (0, 1) else output.all_at(dim)

    return rule


def _repeating(output: Output) -> Sequence[int]:
    (dim, step), shape = output.located or mixes(), output.inputs[0]
    front = dim - len(output.shape) + len(shape)
    repeats = output.node._saved_repeats[dim]
    if front < 0 or shape[front] == 1 or (step == shape[front] and repeats == output.batch_size):
        return [SHARED]
    return mixes() if repeats != 1 else output.all_at(front)


def picking(output: Output) -> Sequence[int]:
    """Advanced indices."""
    kinds = picks_of(output.node)
    if output.dim != 0 or not kinds:
        raise MixesError
    if kinds[0] == "whole":  # with a gap they put their dimension first
        return output.all_at(0) if kinds.count("whole") == len(kinds) - 1 else mixes()
    for dim, kind in enumerate(kinds):
        if kind == "every row":
            with suppress(MixesError):
                return output.all_at(dim)
    raise MixesError


def _recurrent(output: Output) -> Sequence[int]:
    """Time first: input, four weights, states (B, width)."""
    if output.dim != (0 if output.number else 1) or output.node._saved_batch_sizes:
        raise MixesError
    read, *weights = output.inputs[:5]
    states = [output.at(shape, len(shape) - 2) for shape in output.inputs[5:]]
    return [output.at(read, 1), *[SHARED] * len(weights), *states]


def _in_a_cell(output: Output) -> Sequence[int]:
    """Gates and states (B, width); biases."""
    if output.dim != 0:
        raise MixesError
    return [output.at(shape, 0) if len(shape) > 1 else SHARED for shape in output.inputs]


def handed_on(output: Output) -> Sequence[int]:
    """Each output is one of the inputs."""
    return [output.stride if n == output.number else UNREAD for n in range(len(output.inputs))]


def mixing(output: Output) -> Sequence[int]:
    """Nothing is known."""
    mixes()


ATTENTION = (
    "ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention "
    "ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu "
    "ScaledDotProductFusedAttentionOverrideable"
)

_OF_ANY_SIZE = "ReflectionPad{0}D ReplicationPad{0}D UpsampleNearest{0}D UpsampleNearestExact{0}D "

_NAMES: dict[Rule, str] = {
    elementwise: (
        "Abs Acos Acosh Add Addcdiv Addcmul Angle Asin Asinh Atan Atan2 Atanh Bernoulli Celu Ceil "
        "Clamp ClampMax ClampMin Clone Complex Conj ConjPhysical Copysign Cos Cosh Digamma Div "
        "Elu Erf Erfc Erfinv Exp Exp2 Expand Expm1 Fill Floor Fmax Fmin Fmod Frac Gelu Hardshrink "
        "Hardsigmoid Hardswish Hardtanh Hypot LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 "
        "LogSigmoid Logaddexp Logit MaskedFill Maximum Minimum Mish Mul NanToNum NativeDropout "
        "Neg Polar Pow PreluKernel Reciprocal Relu Remainder Round RreluWithNoise Rsqrt Rsub Sgn "
        "Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy "
        "torch::autograd::CopyBackwards Trunc Where Xlogy"
    ),
    unreduced: (
        "BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss "
        "SoftMarginLoss"
    ),
    _of_classes: "NllLoss NllLoss2D",
    _of_rows(0): "MultiMarginLoss MultilabelMarginLoss",
    _of_rows(1): "CtcLoss",
    reshaped: "Alias LiftFresh ReshapeAlias Squeeze UnsafeView Unsqueeze View",
    _along("_saved_dim"): (
        "Cummax Cummin Cumprod Cumsum FftC2C FftC2R FftR2C Gather Glu IndexAdd IndexSelect "
        "LogSoftmax Logcumsumexp SafeSoftmax Scatter ScatterAdd Softmax Sort Topk"
    ),
    _in_blocks: "Cat Slice Split SplitWithSizes UnsafeSplit UnsafeSplitWithSizes",
    _along("_saved_dims"): "Flip Roll",
    _reducing: (
        "Amax Amin Kthvalue LinalgVectorNorm Logsumexp Max Mean Median Min Mode Norm Prod Std "
        "StdMean Sum Var VarMean"
    ),
    _inserting: "Stack",
    removing: "Select Unbind",
    _windowed: "Unfold",
    swapping: "T Transpose",
    permuting: "Permute",
    _multiplying: "Addmm Baddbmm Bmm Mm",
    _with_weights(lambda output: len(output.shape) - 1): "Linear MkldnnLinear",
    _with_weights(lambda output: 1): (
        "ChannelShuffle Col2Im Convolution ConvolutionOverrideable Im2Col Mv NativeGroupNorm"
    ),
    _with_weights(lambda o: len(o.shape) - len(o.node._saved_normalized_shape)): (
        "NativeLayerNorm FusedRmsNorm"
    ),
    _batch_norm: "CudnnBatchNorm MiopenBatchNorm NativeBatchNorm",
    lambda output: [SHARED] * len(output.inputs): "Embedding EmbeddingBag",
    _along_last(1): _OF_ANY_SIZE.format(1) + "UpsampleLinear1D",
    _along_last(2): _OF_ANY_SIZE.format(2)
    + (
        f"{ATTENTION} AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices Tril Triu "
        "UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa"
    ),
    _along_last(3): _OF_ANY_SIZE.format(3)
    + (
        "AdaptiveAvgPool3D AdaptiveMaxPool3D AvgPool3D GridSampler2D MaxPool3DWithIndices "
        "PixelShuffle PixelUnshuffle UpsampleTrilinear3D"
    ),
    _along_last(4): "GridSampler3D",
    lambda output: _along_last(len(output.node._saved_pad) // 2)(output): "ConstantPadNd",
    _repeating: "Repeat",
    picking: "Index",
    _recurrent: "MkldnnRnnLayer",
    _in_a_cell: "ThnnFusedGruCell ThnnFusedLstmCell",
}

RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
