"""Which modules and functions are linear in their parameters: one short rule for each.

A rule turns one call into a `LayerCall`, or returns None where it does not cover that call.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    ConvolutionCall,
    ElementwiseCall,
    EmbeddingBagCall,
    EmbeddingCall,
    LayerCall,
    LinearCall,
    NormCall,
)

Rule = Callable[..., LayerCall | None]
_Rule = TypeVar("_Rule", bound=Rule)

_BY_TYPE: dict[type | str, Rule] = {}

CALLS = "irw_optim.call"
"""Where a node's metadata keep the calls that computed its outputs."""


def layer_rule(*layers: type[nn.Module] | str) -> Callable[[_Rule], _Rule]:
    """Register ``rule(module, *args, **kwargs) -> LayerCall | None`` for module types.

    Args:
        *layers: module classes, or the full names of classes that must not be imported for it.
    """

    def register(rule: _Rule) -> _Rule:
        _BY_TYPE.update(dict.fromkeys(layers, rule))
        _rule_of_type.cache_clear()
        return rule

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """Its type's, or a base class's whose ``forward`` it keeps."""
    if "parametrizations" in module._modules:
        return None
    return _rule_of_type(type(module))  # type: ignore[arg-type]  # they are hashable


@cache
def _rule_of_type(kind: type[nn.Module]) -> Rule | None:
    for base in kind.__mro__:
        rule = _BY_TYPE.get(base) or _BY_TYPE.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            keeps_forward = getattr(kind, "forward", None) is getattr(base, "forward", None)
            return rule if keeps_forward else None
    return None


def rule_of_function(function: Any) -> Rule | None:
    """``rule(output, *args, **kwargs)`` for a function or a method."""
    return _BY_FUNCTION.get(function)


def call_of(
    rule: Rule, subject: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> LayerCall | None:
    """What the rule makes of a call of a module, or of a function that returned the subject.

    None for arguments that it does not know.
    """
    try:
        return rule(subject, *args, **kwargs)
    except TypeError:
        try:
            signature(rule).bind(subject, *args, **kwargs)
        except TypeError:
            return None
        raise


@layer_rule(nn.Linear)
def _linear_layer(module: nn.Linear, input: Tensor) -> LayerCall | None:
    return _linear(module, input, module.weight, module.bias)


def _linear(
    subject: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> LayerCall | None:
    return LinearCall(input, weight, bias) if input.ndim > 1 else None


@layer_rule("transformers.pytorch_utils.Conv1D")
def _transposed_linear(module: Any, x: Tensor) -> LayerCall:
    return LinearCall(x, module.weight, module.bias, transposed=True)


@layer_rule(
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)
def _convolution(
    module: Any, input: Tensor, output_size: list[int] | None = None
) -> LayerCall | None:
    if input.ndim != module.weight.ndim:
        return None  # one sample without a batch dimension
    stride, padding, dilation = module.stride, module.padding, module.dilation
    output_padding = (0,) * len(stride)
    if module.transposed:
        settings = (stride, padding, module.kernel_size, len(stride), dilation)
        output_padding = module._output_padding(input, output_size, *settings)
    elif isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        input = F.pad(input, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(stride)
    return ConvolutionCall(
        input,
        module.weight,
        module.bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=module.transposed,
        output_padding=output_padding,
        groups=module.groups,
    )


@layer_rule(nn.Embedding)
def _embedding(module: nn.Embedding, input: Tensor) -> LayerCall | None:
    if module.scale_grad_by_freq:
        return None
    return EmbeddingCall(input, module.weight, module.padding_idx, module.sparse)


@layer_rule(nn.EmbeddingBag)
def _embedding_bag(
    module: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> LayerCall | None:
    if module.mode == "max" or module.scale_grad_by_freq:
        return None  # not linear in the table; depends on the other samples
    return EmbeddingBagCall(
        input,
        module.weight,
        module.sparse,
        offsets=offsets,
        mode=module.mode,
        per_sample_weights=None if per_sample_weights is None else per_sample_weights.detach(),
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
    )


@layer_rule(nn.LayerNorm, nn.RMSNorm)
def _normalising_layer(module: Any, input: Tensor) -> LayerCall:
    norm = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
    shape, bias = module.normalized_shape, getattr(module, "bias", None)
    return _layer_norm(module, input, shape, module.weight, bias, module.eps, norm=norm)


def _layer_norm(
    subject: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    norm: Callable[..., Tensor] = F.layer_norm,
) -> LayerCall:
    shape = list(normalized_shape)
    normalise = partial(norm, normalized_shape=shape, eps=eps)
    return NormCall(input, normalise, tuple(range(-len(shape), 0)), weight, bias)


@layer_rule(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, input: Tensor) -> LayerCall:
    return _of_channels(module, input, partial(F.group_norm, num_groups=module.num_groups))


@layer_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(module: nn.InstanceNorm2d, input: Tensor) -> LayerCall | None:
    if input.ndim != module._get_no_batch_dim() + 1:
        return None
    if not module.training and module.track_running_stats:
        return _batch_norm(module, input)
    return _of_channels(module, input, F.instance_norm)


@layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: nn.BatchNorm2d | nn.InstanceNorm2d, input: Tensor) -> LayerCall | None:
    mean, variance = module.running_mean, module.running_var
    if module.training or mean is None:
        return None  # normalised by the batch: the samples mix
    norm = partial(F.batch_norm, running_mean=mean, running_var=variance)
    return _of_channels(module, input, norm)


def _of_channels(module: Any, input: Tensor, normalise: Callable[..., Tensor]) -> LayerCall:
    function = partial(normalise, eps=module.eps)
    return NormCall(input, function, (1,), module.weight, module.bias)


def _sum(
    output: Tensor, input: Any, other: Any, *, alpha: float = 1, signs: tuple[int, int] = (1, 1)
) -> LayerCall | None:
    """Of a parameter and something else."""
    if is_parameter(input) == is_parameter(other):
        return None
    if is_parameter(input):
        return ElementwiseCall(input, None, output, signs[0])
    return ElementwiseCall(other, None, output, signs[1] * alpha)


def _multiplication(output: Tensor, input: Any, other: Any) -> LayerCall | None:
    if is_parameter(input):
        input, other = other, input
    if not is_parameter(other) or not isinstance(input, Tensor) or is_parameter(input):
        return None
    return ElementwiseCall(other, input, output)


def _expansion(output: Tensor, input: Tensor, *sizes: Any, **size: Any) -> LayerCall | None:
    return ElementwiseCall(input, None, output) if is_parameter(input) else None


def _repetition(output: Tensor, input: Tensor, *sizes: Any, **size: Any) -> LayerCall | None:
    """Where it repeats dimensions of size 1 alone."""
    repeated = zip(reversed(input.shape), reversed(output.shape), strict=False)
    broadcasts = all(n in (1, size) for n, size in repeated)
    return _expansion(output, input) if broadcasts else None


_BY_FUNCTION: dict[Any, Rule] = {
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    Tensor.__rsub__: partial(_sum, signs=(-1, 1)),
    **dict.fromkeys([torch.add, Tensor.add, Tensor.add_], _sum),
    **dict.fromkeys([Tensor.__add__, Tensor.__radd__, Tensor.__iadd__], _sum),
    **dict.fromkeys(
        [torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__],
        partial(_sum, signs=(1, -1)),
    ),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _multiplication),
    **dict.fromkeys([torch.broadcast_to, Tensor.broadcast_to], _expansion),
    **dict.fromkeys([Tensor.expand, Tensor.expand_as], _expansion),
    **dict.fromkeys([torch.tile, Tensor.tile, Tensor.repeat], _repetition),
}


def is_parameter(tensor: Any) -> bool:
    """Whether it is a trainable leaf, or a plain view of one without other calls."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return False
    if tensor.is_leaf:
        return True
    whole = tensor._base
    if whole is None or not whole.is_leaf or whole.dtype != tensor.dtype or tensor.is_conj():
        return False
    node: Any = tensor.grad_fn
    while node is not None and node.next_functions:
        if CALLS in node.metadata:
            return False
        node = node.next_functions[0][0]
    return True
