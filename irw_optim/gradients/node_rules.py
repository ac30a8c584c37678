"""Which layer calls an operation makes, from what it saved for autograd."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .layers import (
    CONVOLUTION,
    LSTM,
    ChannelNormCall,
    ConvolutionCall,
    ElementwiseCall,
    EmbeddingBagCall,
    EmbeddingCall,
    HeadsCall,
    LayerCall,
    LinearCall,
    LSTMCall,
    SampleNormCall,
    VectorCall,
)
from .mixing import rule_for
from .mixing_rules import elementwise
from .nodes import base_name, saved, shape_of, slopes_of
from .pushforward import ChainPlaces
from .recurrence import RECURRENT


class Weight(NamedTuple):
    """A tensor that all samples share."""

    tensor: Tensor  # a leaf, or a stand-in without numbers
    chain: ChainPlaces | None  # how it was computed; None for a leaf
    turned: bool = False  # whether the operation read its transpose


Weights = Mapping[int, Weight]
"""What an operation shares among the samples, by the number of the input."""

NodeRule = Callable[[Any, Weights], "Sequence[LayerCall] | None"]

FUSED_CELLS: dict[str, dict[int, tuple[int, ...]]] = {
    "ThnnFusedGruCell": {3: (0,), 4: (1,)},
    "ThnnFusedLstmCell": {3: (1, 0), 4: (1, 0)},
}
"""For each bias the gates to which it is added, whose gradient is its own; as numbers of inputs.

The first that has one counts: a frozen weight gives the first step none.
"""


def rule_of(node: Node, output: int, weights: Weights) -> NodeRule | None:
    """Of an operation whose output of this number holds the batch."""
    name = base_name(node)
    if name == "MkldnnRnnLayer":
        return partial(_recurrent, output)
    entry = _BY_NAME.get(name) if output == 0 else None
    if entry is None:
        return of_each_number if rule_for(node) is elementwise else None
    rule, samples = entry
    return None if samples in weights else rule


def _affine(node: Any, weights: Weights) -> list[LayerCall] | None:
    if node._saved_alpha != 1:
        return None
    summand, weight, beta = weights.get(0), weights.get(2), node._saved_beta
    calls: list[LayerCall] = []
    bias: Tensor | None = None
    if summand is not None:
        bias = summand.tensor
        if summand.turned:
            return None
        if weight is None or beta != 1 or bias.ndim != 1:
            calls.append(ElementwiseCall(bias, None, _like_output(node), beta))
            bias = None
    if weight is not None:
        turned = not weight.turned
        calls.append(LinearCall(node._saved_mat1, weight.tensor, bias, transposed=turned))
    return calls


def _linear(node: Any, weights: Weights) -> list[LayerCall]:
    weight = weights[1]
    return [LinearCall(node._saved_self, weight.tensor, transposed=not weight.turned)]


def _by_vector(node: Any, weights: Weights) -> list[LayerCall]:
    return [VectorCall(node._saved_self, weight=weights[1].tensor)]


def _linear_by_heads(node: Any, weights: Weights) -> list[LayerCall] | None:
    *summand, _, right = range(len(node.next_functions))
    if weights.keys() != {right} or getattr(node, "_saved_alpha", 1) != 1:
        return None
    read = node._saved_batch1 if summand else node._saved_self
    return [HeadsCall(read, weight=weights[right].tensor)]


def _convolution(node: Any, weights: Weights) -> list[LayerCall]:
    bias = weights[2].tensor if 2 in weights else None
    if 1 in weights:
        input, weight = node._saved_input, weights[1].tensor
    else:  # of a frozen weight and what it reads nothing may be left
        assert bias is not None
        input, weight = _like_output(node), bias.detach()
    settings = {name: saved(node, name) for name in CONVOLUTION}
    call = ConvolutionCall(input, weight, bias, **settings)
    if weight.is_meta:
        call.weight = call.input.new_empty(()).expand(weight.shape)
    return [call]


def _embedding(node: Any, weights: Weights) -> list[LayerCall] | None:
    if node._saved_scale_grad_by_freq:
        return None  # the gradient of one sample depends on the indices of the others
    indices, sparse, table = node._saved_indices, node._saved_sparse, weights[0].tensor
    return [EmbeddingCall(indices, table, _padding(node), sparse)]


def _embedding_bag(node: Any, weights: Weights) -> list[LayerCall] | None:
    mode, offsets = ("sum", "mean", "max")[node._saved_mode], node._saved_offsets
    if mode == "max" or node._saved_scale_grad_by_freq:
        return None
    return [
        EmbeddingBagCall(
            node._saved_indices,
            weights[0].tensor,
            node._saved_sparse,
            offsets=offsets,
            mode=mode,
            per_sample_weights=node._saved_per_sample_weights,
            include_last_offset=len(offsets) > shape_of(node)[0],
            padding_idx=_padding(node),
        )
    ]


def _padding(node: Any) -> int | None:
    padding: int = saved(node, "padding_idx")
    return padding if padding >= 0 else None


def _layer_norm(node: Any, weights: Weights) -> list[LayerCall]:
    dims = tuple(range(-len(node._saved_normalized_shape), 0))
    mean, scale = node._saved_result1, node._saved_result2
    return [SampleNormCall(node._saved_input, mean, scale, dims, *_gain_and_bias(weights))]


def _group_norm(node: Any, weights: Weights) -> list[LayerCall]:
    input, mean, scale = node._saved_input, node._saved_result1, node._saved_result2
    return [ChannelNormCall(input, mean, scale, (1 - input.ndim,), *_gain_and_bias(weights))]


def _batch_norm(node: Any, weights: Weights) -> list[LayerCall] | None:
    if node._saved_training:
        return None
    input, mean, variance = node._saved_input, node._saved_running_mean, node._saved_running_var
    eps = saved(node, "eps" if hasattr(node, "_saved_eps") else "epsilon")
    mean, scale = (t.expand(len(input), -1) for t in (mean, (variance + eps).rsqrt()))
    return [ChannelNormCall(input, mean, scale, (1 - input.ndim,), *_gain_and_bias(weights))]


def _recurrent(output: int, node: Any, weights: Weights) -> list[LayerCall] | None:
    names = RECURRENT if node._saved_has_biases else RECURRENT[:2]
    if node._saved_mode != LSTM or not weights.keys() <= set(range(1, len(names) + 1)):
        return None
    if any(weight.chain is not None for weight in weights.values()):
        return None
    input, *_, (state, _), (cell, _) = node.next_functions
    return [
        LSTMCall(
            node._saved_input,
            node._saved_result0,
            node._saved_hx_,
            node._saved_cx_,
            {name: getattr(node, f"_saved_weight{n}") for n, name in enumerate(names)},
            {names[n - 1]: weight.tensor for n, weight in weights.items()},
            output=output,
            reverse=node._saved_reverse,
            hands_back=GradientEdge(*input) if input[0] and not (state or cell) else None,
        )
    ]


def _sum(node: Any, weights: Weights) -> list[LayerCall]:
    sign = -1 if base_name(node) == "Sub" else 1
    scales = 1, sign * node._saved_alpha
    output = _like_output(node)
    return [ElementwiseCall(w.tensor, None, output, scales[n]) for n, w in weights.items()]


def summands(node: Any, weights: Weights) -> list[LayerCall]:
    """Of what a node makes, or is added to it later."""
    output = _like_output(node)
    return [ElementwiseCall(weight.tensor, None, output) for weight in weights.values()]


def _repetition(node: Any, weights: Weights) -> list[LayerCall]:
    """With a dimension for copies in front of each."""
    weight, repeats = weights[0].tensor, list(node._saved_repeats)
    sizes = [*[1] * (len(repeats) - weight.ndim), *weight.shape]
    shape = torch.Size([n for pair in zip(repeats, sizes, strict=True) for n in pair])
    as_it_is, in_front = weight.shape, (*[None] * (len(repeats) - weight.ndim), ...)
    with torch.enable_grad():  # a view tells what it is a view of
        lone = weight.view(as_it_is)[in_front]
        for dim in range(len(repeats)):
            lone = lone.unsqueeze(2 * dim)
    call = ElementwiseCall(lone, None, _like_output(node).new_zeros(()).expand(shape))
    call.output_shape = shape
    return [call]


def _product(node: Any, weights: Weights) -> list[LayerCall]:
    factors = {n: getattr(node, ("_saved_other", "_saved_self")[n]) for n in weights}
    output = _like_output(node)
    return [ElementwiseCall(w.tensor, factors[n], output) for n, w in weights.items()]


def _gain_and_bias(weights: Weights) -> list[Tensor | None]:
    return [weights[n].tensor if n in weights else None for n in (1, 2)]


def of_each_number(node: Any, weights: Weights) -> list[LayerCall] | None:
    """By the slope of each number of the output."""
    output, slopes = _like_output(node), slopes_of(node)
    calls: list[LayerCall] = []
    for number, weight in weights.items():
        slope = slopes[number]
        if slope is None or slope.shape != output.shape or slope.is_complex():
            return None
        calls.append(ElementwiseCall(weight.tensor, slope, output))
    return calls


def _like_output(node: Any) -> Tensor:
    """Without its numbers, which nobody may have saved."""
    metadata = node._input_metadata[0]
    return torch.empty((), dtype=metadata.dtype, device=metadata.device).expand(shape_of(node))


_RULES: dict[str, tuple[NodeRule, int | None]] = {
    "Addmm": (_affine, 1),
    "Mm": (_linear, 0),
    "Mv": (_by_vector, 0),
    "Bmm Baddbmm": (_linear_by_heads, None),
    "Convolution ConvolutionOverrideable": (_convolution, 0),
    "Embedding": (_embedding, None),
    "EmbeddingBag": (_embedding_bag, 1),
    "NativeLayerNorm": (_layer_norm, 0),
    "NativeGroupNorm": (_group_norm, 0),
    "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm": (_batch_norm, 0),
    "Add Sub": (_sum, None),
    "Expand": (summands, None),
    "Repeat": (_repetition, None),
    "Mul": (_product, None),
}
"""The rules, and the number of an input that must not be a weight."""

_BY_NAME = {name: entry for names, entry in _RULES.items() for name in names.split()}
