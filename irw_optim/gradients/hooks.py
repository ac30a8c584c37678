"""What an engine puts on its model: recorders of layer calls, and what keeps others quiet.

A call is kept in the metadata of the graph's node, and lives as long.
"""

from collections.abc import Iterable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from irw_optim.attachments import Attachment, Removable
from irw_optim.torch_internals import itself_uncompiled, uncompiled

from .compiling import CompiledAgain, ItselfKeptOut, KeptOut, Listener, inside, on_forward
from .graph import CallSite
from .layers import LayerCall, LinearCall, LinearRowsCall
from .rules import CALLS, call_of, rule_of, rule_of_function


def hook_layers(model: nn.Module) -> list[Attachment]:
    """Attach the recorders until nobody holds what is returned."""
    attached: list[Attachment] = []
    owners: list[nn.Module] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if rule_of(module) is not None and not _is_patched(module):
                attached.append(RecordedLayer.on(module))
            elif module._parameters or any(isinstance(c, _KEPT) for c in module.children()):
                attached.append(RecordedFunctions.on(module))
                owners.append(module)
        again = [child for owner in owners for child in inside(owner)]
        attached += [CompiledAgain.on(module) for module in dict.fromkeys(again)]
    except BaseException:
        attached.clear()  # the traceback would hold them
        raise
    return attached


_KEPT = nn.ParameterList, nn.ParameterDict
"""What holds parameters for a module, and is not called."""


def _is_patched(module: nn.Module) -> bool:
    """Whether somebody has put a ``forward`` on it, which may compute anything."""
    forward = vars(module).get("forward")
    while isinstance(forward, KeptOut):
        forward = forward.previous
    return forward is not None


def sites_noted(order: Iterable[Any]) -> list[CallSite]:
    """The layer calls noted on the nodes of a graph."""
    return [
        CallSite(call, GradientEdge(node, number), shape)
        for node in order
        for number, (call, shape) in node.metadata.get(CALLS, {}).items()
    ]


def forget_calls(nodes: Iterable[Any]) -> None:
    """The graph may outlive its pass by an iteration."""
    for node in nodes:
        node.metadata.pop(CALLS, None)


def record(call: LayerCall | None, output: Tensor) -> None:
    """Note on the graph that ``call`` computed ``output``."""
    if call is None or not call.parameters or output.is_complex() or output.is_nested:
        return  # products are of real numbers, of one length a sample
    at, base = output, output._base
    if base is not None and base.grad_fn is not None and base.numel() == output.numel():
        # After an in-place operation on a view, as a Linear's (B, T, d) output is one, the
        # gradient arrives at the base's edge alone.
        at = base if base.is_contiguous() and output.is_contiguous() else output
    node: Any = at.grad_fn
    if node is not None:
        node.metadata.setdefault(CALLS, {})[at.output_nr] = (call, output.shape)


class _LayerForward(KeptOut):
    """Notes the calls of a layer that has a rule."""

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output, module = self.__wrapped__(*args, **kwargs), self.module
        if getattr(output, "grad_fn", None) is not None and RecordedLayer.found_on(module):
            rule = rule_of(module)
            if rule is not None:  # it had one, but may have been parametrized since
                record(call_of(rule, module, args, kwargs), output)
        return output


RecordedLayer = on_forward(_LayerForward)


class _FunctionsForward(ItselfKeptOut):
    """Notes the functions that a module calls with parameters of its own."""

    @itself_uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not torch.is_grad_enabled() or not RecordedFunctions.found_on(module):
            return self.__wrapped__(*args, **kwargs)
        with _FunctionRecorder(module):
            return self.__wrapped__(*args, **kwargs)


RecordedFunctions = on_forward(_FunctionsForward)


class _FunctionRecorder(Listener):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.in_attention = isinstance(owner, nn.MultiheadAttention)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.in_attention and function is F.multi_head_attention_forward:
            return _attention_with(_linear_in_attention)(*args, **kwargs)
        rule = rule_of_function(function)
        output = function(*args, **kwargs)
        if rule is not None and isinstance(output, Tensor) and output.grad_fn is not None:
            record(call_of(rule, output, args, kwargs), output)
        return output


def _linear_in_attention(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = F.linear(input, weight, bias)
    if output.grad_fn is not None:
        whole = weight.is_leaf and (bias is None or bias.is_leaf)
        call = (LinearCall if whole else LinearRowsCall)(input, weight, bias)
        call.time_major = True
        record(call, output)
    return output


def _attention_with(linear: Any) -> Any:
    """``F.multi_head_attention_forward`` with another ``linear``, of (T, B, d) or (T * B, d)."""
    names = {**F.__dict__, "linear": linear}
    for name in ("_in_projection", "_in_projection_packed", "multi_head_attention_forward"):
        function = getattr(F, name)
        copy = FunctionType(function.__code__, names, name, function.__defaults__)
        copy.__kwdefaults__ = function.__kwdefaults__
        names[name] = copy
    return names["multi_head_attention_forward"]


def silence_of(model: Any) -> list[Attachment]:
    """Keeps Opacus' hooks quiet for as long as somebody holds it."""
    return [OpacusSilenced.on(model)] if hasattr(model, "hooks_enabled") else []


class OpacusSilenced(Attachment):
    """Opacus' hooks make rows that nobody reads, and trip over passes within a pass."""

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        if module.hooks_enabled:
            module.disable_hooks()  # type: ignore[operator]
            yield _Silence(module)


class _Silence:
    def __init__(self, module: nn.Module) -> None:
        self.module = ref(module)

    def remove(self) -> None:
        module: Any = self.module()
        if module is not None:
            module.enable_hooks()

    def clean(self, state: dict[str, Any]) -> None:
        state["hooks_enabled"] = True


def weighed_by(model: nn.Module) -> WeakSet[Any]:
    """The engines that weigh a model's gradients."""
    return _WEIGHED_BY.setdefault(model, WeakSet())


_WEIGHED_BY: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()

IN_CUDNN = "CudnnRnn"
"""How autograd names the recurrent layers of cuDNN."""


class _OwnKernels(KeptOut):
    """Has a layer take torch's own kernels while gradients are recorded."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=not torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)


WithoutCudnn = on_forward(_OwnKernels)


def without_cudnn(model: nn.Module) -> list[Attachment]:
    """Keep the recurrent layers that still use cuDNN from it."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return [WithoutCudnn.on(layer) for layer in layers if WithoutCudnn.found_on(layer) is None]
