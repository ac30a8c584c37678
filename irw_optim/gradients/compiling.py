"""torch.compile: what of a model it may fuse, so that the layers stay in sight.

Compiled code is one node, whose gradient cannot be differentiated. So layers are kept out of it;
then the modules around parameters without quick products, but not what they call; where that does
not help, the whole model.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from irw_optim.attachments import Attachment, OfModule, Removable, Replaced
from irw_optim.torch_internals import (
    compile_for_each_layer,
    compiled_again,
    itself_uncompiled,
    keep_for_further_passes,
    uncompiled,
)


class KeptOut(OfModule):
    """Stands in for a module's ``forward``, outside of what torch.compile traces."""

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands in for; its signature is ours."""
        return self.previous or MethodType(type(self.module).forward, self.module)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


class OnForward(Attachment):
    """Has something stand in for a module's ``forward``."""

    stands_in: ClassVar[type[KeptOut]]

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        yield Replaced(module, "forward", self.stands_in(module))


def on_forward(stand_in: type[KeptOut]) -> type[OnForward]:
    """What puts it there."""
    return type(f"{stand_in.__name__}On", (OnForward,), {"stands_in": stand_in})


Uncompiled = on_forward(KeptOut)


class ItselfKeptOut(KeptOut):
    """The same, uncompiled but for the modules it calls."""

    @itself_uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


UncompiledItself = on_forward(ItselfKeptOut)


class _Again(KeptOut):
    """Lets a module be compiled though the one that calls it is not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.__wrapped__(*args, **kwargs)
        return compiled_again(self.__wrapped__, Listener, *args, **kwargs)


CompiledAgain = on_forward(_Again)


class Listener(TorchFunctionMode):
    """A mode for the forward of one module, not for the modules that it calls."""


def keep_out(model: nn.Module) -> list[Attachment]:
    """Keep a model, and what is compiled inside by itself, out of it."""
    torch.compiler.reset()
    inner = [_original(module) for module in model.modules() if is_compiled_module(module)]
    return [Uncompiled.on(module) for module in dict.fromkeys([_original(model), *inner])]


def keep_out_around(model: nn.Module, parameters: Set[Tensor]) -> list[Attachment]:
    """Keep the modules around some parameters out; none where nothing is compiled then."""
    original = _original(model)
    around = [
        module
        for module in original.modules()
        if not _is_kept_out(module) and not parameters.isdisjoint(module.parameters())
    ]
    held = [UncompiledItself.on(module) for module in around]
    again = [child for module in around for child in inside(module)]
    if not any(True for child in again for _ in child.parameters()):
        return []
    torch.compiler.reset()
    return [*held, *(CompiledAgain.on(module) for module in again)]


def inside(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in one that torch would compile by themselves."""
    for child in module.children():
        if _is_kept_out(child) or isinstance(child, torch.jit.ScriptModule):
            continue
        if type(child).__module__.startswith("torch.nn."):
            yield from inside(child)
        else:
            yield child


def _is_kept_out(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, KeptOut) and not isinstance(forward, _Again)


def prepare(model: nn.Module | None) -> None:
    """Have compiled code passed back through more than once; refuse recorded CUDA graphs."""
    keep_for_further_passes()
    modules = [] if model is None else [*model.modules()]
    if any(map(is_compiled_module, modules)):
        compile_for_each_layer()
    if model is None or not any(p.is_cuda for p in model.parameters()):
        return
    for module in modules:
        compiled = getattr(module, "_compiled_call_impl", None) or module
        tell = getattr(compiled, "get_compiler_config", None)
        if tell is not None and (tell() or {}).get("triton.cudagraphs"):
            raise RuntimeError(_RECORDED)


def compile_anew(nodes: Iterable[Node]) -> None:
    """Drop compiled code, which calls no later recorders."""
    torch.compiler.reset()
    compile_for_each_layer()
    for node in filter(is_compiled, nodes):
        forward = getattr(getattr(node, "_forward_cls", None), "compiled_fw", None)
        recorded = getattr(forward, "fx_kwargs", {}).get("cudagraphs")
        if recorded:  # torch's BoxedBool, or None
            raise RuntimeError(_RECORDED)


_RECORDED = (
    'this model is compiled with CUDA graphs (mode="reduce-overhead" or "max-autotune"), which '
    "overwrite their results at every call, while a weighted step needs several; compile it with "
    'mode="default" or "max-autotune-no-cudagraphs"'
)


def is_compiled_module(module: nn.Module) -> bool:
    """Whether it was itself handed to torch.compile."""
    return hasattr(module, "_orig_mod") or bool(getattr(module, "_compiled_call_impl", None))


def _original(module: nn.Module) -> nn.Module:
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def is_compiled(node: Node) -> bool:
    """Whether a node is the backward pass of a region that torch.compile made."""
    return isinstance(node, BackwardCFunction) and node.name().startswith("CompiledFunction")


def is_control_flow(node: Any) -> bool:
    """Whether torch traced what it calls (torch.cond), which has to find the layers as they are."""
    made_by = getattr(node, "_forward_cls", object)
    return str(made_by.__module__).startswith("torch._higher_order_ops")
