"""Which functions are linear in parameters that a module hands them directly: a rule for each.

They are asked with the words of the forward: whoever writes ``torch.add(x, other=p, alpha=2)`` must
get what ``x + 2 * p`` gets, or no rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.layers import ElementwiseCall, LayerCall, LinearCall, NormCall
from irw_optim.gradients.rules import Rule

_Rule = TypeVar("_Rule", bound=Rule)

_BY_FUNCTION: dict[Any, Rule] = {}

CALLS = "irw_optim.call"
"""Where a node of the graph keeps the calls that computed its outputs, in its metadata."""


def function_rule(*functions: Any) -> Callable[[_Rule], _Rule]:
    """Register ``rule(output, *args, **kwargs) -> LayerCall | None`` for functions and methods.

    It is asked where a module without a layer rule calls them with its parameters directly.
    """

    def register(rule: _Rule) -> _Rule:
        for function in functions:
            _BY_FUNCTION[function] = rule
        return rule

    return register


def rule_of_function(function: Any) -> Rule | None:
    """The rule for a function that is called with parameters directly."""
    return _BY_FUNCTION.get(function)


@function_rule(F.linear)
def _linear_function(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> LayerCall | None:
    return LinearCall(input, weight, bias) if input.ndim > 1 else None


@function_rule(F.layer_norm)
def _layer_norm_function(
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> LayerCall:
    shape = list(normalized_shape)
    dims = tuple(range(-len(shape), 0))
    return NormCall(input, lambda a: F.layer_norm(a, shape, eps=eps), dims, weight, bias)


@function_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _addition(output: Tensor, input: Any, other: Any, *, alpha: float = 1) -> LayerCall | None:
    return _sum(output, input, other, 1, alpha)


@function_rule(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__)
def _subtraction(output: Tensor, input: Any, other: Any, *, alpha: float = 1) -> LayerCall | None:
    return _sum(output, input, other, 1, -alpha)


@function_rule(Tensor.__rsub__)
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


@function_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _multiplication(output: Tensor, input: Any, other: Any) -> LayerCall | None:
    if is_parameter(input):
        input, other = other, input
    if not is_parameter(other) or not isinstance(input, Tensor) or is_parameter(input):
        return None
    return ElementwiseCall(other, input, output)


@function_rule(Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to)
def _expansion(output: Tensor, input: Tensor, *sizes: Any, **size: Any) -> LayerCall | None:
    return ElementwiseCall(input, None, output) if is_parameter(input) else None


@function_rule(Tensor.repeat, Tensor.tile, torch.tile)
def _repetition(output: Tensor, input: Tensor, *sizes: Any, **size: Any) -> LayerCall | None:
    """Where it repeats dimensions of size 1 alone, and so broadcasts."""
    repeated = zip(reversed(input.shape), reversed(output.shape), strict=False)
    broadcasts = all(n in (1, size) for n, size in repeated)
    return ElementwiseCall(input, None, output) if broadcasts and is_parameter(input) else None


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
