"""Which functions are linear in parameters that a module hands them directly: a rule for each.

They are asked with the words of the forward: whoever writes ``torch.add(x, other=p, alpha=2)`` must
get what ``x + 2 * p`` gets, or no rule.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers import ElementwiseCall, LayerCall
from irw_optim.gradients.rules import Rule, layer_norm, linear

CALLS = "irw_optim.call"
"""Where a node of the graph keeps the calls that computed its outputs, in its metadata."""


def rule_of_function(function: Any) -> Rule | None:
    """``rule(output, *args, **kwargs) -> LayerCall | None`` for a function or a method."""
    return _BY_FUNCTION.get(function)


def _addition(output: Tensor, input: Any, other: Any, *, alpha: float = 1) -> LayerCall | None:
    return _sum(output, input, other, 1, alpha)


def _subtraction(output: Tensor, input: Any, other: Any, *, alpha: float = 1) -> LayerCall | None:
    return _sum(output, input, other, 1, -alpha)


def _subtraction_from(output: Tensor, input: Any, other: Any) -> LayerCall | None:
    return _sum(output, input, other, -1, 1)


def _sum(
    output: Tensor, left: Any, right: Any, left_scale: float, right_scale: float
) -> LayerCall | None:
    """Of a parameter and something else; of two parameters, one call alone cannot tell."""
    if is_parameter(left) == is_parameter(right):
        return None
    if is_parameter(left):
        return ElementwiseCall(left, None, output, left_scale)
    return ElementwiseCall(right, None, output, right_scale)


def _multiplication(output: Tensor, input: Any, other: Any) -> LayerCall | None:
    if is_parameter(input):
        input, other = other, input
    if not is_parameter(other) or not isinstance(input, Tensor) or is_parameter(input):
        return None
    return ElementwiseCall(other, input, output)


def _expansion(output: Tensor, input: Tensor, *sizes: Any, **size: Any) -> LayerCall | None:
    return ElementwiseCall(input, None, output) if is_parameter(input) else None


def _repetition(output: Tensor, input: Tensor, *sizes: Any, **size: Any) -> LayerCall | None:
    """Where it repeats dimensions of size 1 alone, and so broadcasts."""
    repeated = zip(reversed(input.shape), reversed(output.shape), strict=False)
    broadcasts = all(n in (1, size) for n, size in repeated)
    return _expansion(output, input) if broadcasts else None


_BY_FUNCTION: dict[Any, Rule] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    Tensor.__rsub__: _subtraction_from,
    **dict.fromkeys([torch.add, Tensor.add, Tensor.add_], _addition),
    **dict.fromkeys([Tensor.__add__, Tensor.__radd__, Tensor.__iadd__], _addition),
    **dict.fromkeys([torch.sub, Tensor.sub, Tensor.sub_], _subtraction),
    **dict.fromkeys([Tensor.__sub__, Tensor.__isub__], _subtraction),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _multiplication),
    **dict.fromkeys([torch.broadcast_to, Tensor.broadcast_to], _expansion),
    **dict.fromkeys([Tensor.expand, Tensor.expand_as], _expansion),
    **dict.fromkeys([torch.tile, Tensor.tile, Tensor.repeat], _repetition),
}


def is_parameter(tensor: Any) -> bool:
    """Whether this is a trainable leaf, or a plain view of one that no other call accounts for."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return False
    if tensor.is_leaf:
        return True
    whole = tensor._base
    if whole is None or not whole.is_leaf or whole.dtype != tensor.dtype or tensor.is_conj():
        return False
    node = tensor.grad_fn
    while node is not None and node.next_functions:
        if CALLS in node.metadata:  # type: ignore[operator]  # a property, stubbed as a method
            return False
        node = node.next_functions[0][0]
    return True
