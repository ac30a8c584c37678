"""Notes, on the autograd graph itself, which layer computed what.

A call is kept in the metadata of the graph's own node. So it lives exactly as long as the graph,
belongs to the loss that the graph leads to, and survives in-place operations on the output: there
is no list to reset, and two forwards before one backward, or a forward without any, need no care.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from irw_optim.attachments import Attachment
from irw_optim.gradients.compiling import (
    CompiledAgain,
    ItselfKeptOut,
    KeptOut,
    Listener,
    OnForward,
    inside,
)
from irw_optim.gradients.graph import CallSite
from irw_optim.gradients.layers import LayerCall, LinearCall, LinearRowsCall
from irw_optim.gradients.rules import CALLS, call_of, rule_of, rule_of_function
from irw_optim.torch_internals import itself_uncompiled, uncompiled


def hook_layers(model: nn.Module) -> list[Attachment]:
    """Attach the recorders in place, for as long as somebody holds what is returned.

    Scripted modules take none: their parameters are left to autograd.
    """
    attached: list[Attachment] = []
    owners: list[nn.Module] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if rule_of(module) is not None:
                attached.append(RecordedLayer.on(module))
            elif _holds_parameters(module):
                attached.append(RecordedFunctions.on(module))
                owners.append(module)
        again = [child for owner in owners for child in inside(owner)]
        attached += [CompiledAgain.on(module) for module in dict.fromkeys(again)]
    except BaseException:
        attached.clear()  # the traceback would hold them
        raise
    return attached


def _holds_parameters(module: nn.Module) -> bool:
    """Whether it has parameters of its own, be it in a list or a dictionary, which nobody calls."""
    kept = (nn.ParameterList, nn.ParameterDict)
    return bool(module._parameters) or any(isinstance(child, kept) for child in module.children())


def sites_noted(order: Iterable[Node]) -> list[CallSite]:
    """The layer calls that hooks have noted on the nodes of a graph."""
    return [
        CallSite(call, GradientEdge(node, number), shape)
        for node in order
        for number, (call, shape) in _notes(node).get(CALLS, {}).items()
    ]


def forget_calls(nodes: Iterable[Node]) -> None:
    """Drop what the hooks kept: the graph may outlive its backward pass by an iteration."""
    for node in nodes:
        _notes(node).pop(CALLS, None)


def record(call: LayerCall | None, output: Tensor) -> None:
    """Note on the graph that ``call`` computed ``output``."""
    if call is None or not call.parameters or output.is_complex():
        return  # the products are of real numbers; autodiff takes complex ones
    at = output
    if output._is_view() and output._base is not None and output._base.grad_fn is not None:
        # An in-place operation on a view rewrites the graph up to the base: the gradient then
        # arrives at the base's edge alone. A Linear's (B, T, d) output is such a view.
        base = output._base
        if base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
            at = base
    if at.grad_fn is not None:
        _notes(at.grad_fn).setdefault(CALLS, {})[at.output_nr] = (call, output.shape)


def _notes(node: Node) -> dict[Any, Any]:
    return node.metadata  # type: ignore[return-value]  # a property, stubbed as a method


class _LayerForward(KeptOut):
    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output, module = self.__wrapped__(*args, **kwargs), self.module
        if getattr(output, "grad_fn", None) is not None and RecordedLayer.found_on(module):
            rule = rule_of(module)
            if rule is not None:  # it had one, but may have been parametrized since
                record(call_of(rule, module, args, kwargs), output)
        return output


class RecordedLayer(OnForward):
    """Notes the calls of a layer that has a rule."""

    stands_in = _LayerForward


class _FunctionsForward(ItselfKeptOut):
    @itself_uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not torch.is_grad_enabled() or not RecordedFunctions.found_on(module):
            return self.__wrapped__(*args, **kwargs)
        with _FunctionRecorder(module):
            return self.__wrapped__(*args, **kwargs)


class RecordedFunctions(OnForward):
    """Notes the functions that a module calls with parameters of its own."""

    stands_in = _FunctionsForward


class _FunctionRecorder(Listener):
    """Sees functions called with parameters directly, as in attention's input projection."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.in_attention = isinstance(owner, nn.MultiheadAttention)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.in_attention and function is F.multi_head_attention_forward:
            return _attention_with(self.linear_in_attention)(*args, **kwargs)
        rule = rule_of_function(function)
        output = function(*args, **kwargs)
        if rule is not None and isinstance(output, Tensor) and output.grad_fn is not None:
            record(call_of(rule, output, args, kwargs), output)
        return output

    def linear_in_attention(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        output = F.linear(input, weight, bias)
        if output.grad_fn is not None:
            whole = weight.is_leaf and (bias is None or bias.is_leaf)
            call = (LinearCall if whole else LinearRowsCall)(input, weight, bias)
            call.time_major = True
            record(call, output)
        return output


def _attention_with(linear: Any) -> Any:
    """``F.multi_head_attention_forward`` with another ``linear``: it offers no hook of its own.

    Inside it works on (T, B, d) and (T * B, d).
    """
    names = {**F.__dict__, "linear": linear}
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        function = getattr(F, name)
        copy = FunctionType(function.__code__, names, name, function.__defaults__)
        copy.__kwdefaults__ = function.__kwdefaults__
        names[name] = copy
    return names["multi_head_attention_forward"]
