"""What is used of torch that it does not promise or always have, and what stands in for it."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from itertools import takewhile
from types import CodeType, FunctionType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

_Function = TypeVar("_Function", bound=Callable[..., Any])

_engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
_disable: Any = getattr(torch, "_disable_dynamo", torch.compiler.disable)
_frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_modes: Any = getattr(torch.overrides, "_get_current_function_mode_stack", None)
_without_mode: Any = getattr(torch.overrides, "_pop_mode_temporarily", None)
_set_compiler: Any = getattr(_frames, "set_eval_frame", None)


def _by_autograd(
    losses: Any, cotangents: Any, retain: bool, again: bool, edges: Any, *_: Any, **__: Any
) -> Any:
    return torch.autograd.grad(losses, edges, cotangents, retain, again, allow_unused=True)


run_backward: Any = getattr(_engine, "run_backward", _by_autograd)
"""``torch.autograd.grad`` without its checks, which take as long as a small pass."""

graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
"""Whether the backward pass that runs now retains the graph; yes where torch does not tell."""

will_run: Callable[[Node], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)
"""Whether it goes through a node after this one."""

transform: Callable[[], object] = getattr(
    torch._C._functorch, "peek_interpreter_stack", lambda: None
)
"""That of `torch.func` which follows what is computed now, if any."""

dual_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level", -1)
"""That of forward mode; -1 outside of it."""


def is_plain_autograd() -> bool:
    """Whether surely no transform or checkpoint follows what is computed now; else no."""
    hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    told = hasattr(torch._C._functorch, "peek_interpreter_stack")
    if hooks is None or not told or torch._C._get_tracing_state() is not None:
        return False
    return dual_level() < 0 and transform() is None and hooks(True) is None


def is_wanted(leaf: Node) -> bool:
    """Whether it asks for the gradient that a node accumulates."""
    try:
        return will_run(leaf)
    except RuntimeError:  # torch's answer for a leaf that `autograd.grad` was asked for
        return True


def at_the_end_of_backward(call: Callable[[], None]) -> None:
    """Call something when that is over; at once where torch cannot."""
    if _engine is None:
        call()
    else:
        _engine.queue_callback(call)


def uncompiled(function: _Function) -> _Function:
    """`torch.compiler.disable`, which does not load the compiler at once."""
    return cast("_Function", _disable(function))


def itself_uncompiled(function: _Function) -> _Function:
    """The same but for what `compiled_again` calls, where torch tells who compiles."""
    if None in (_set_compiler, _modes, _without_mode):
        return uncompiled(function)

    @wraps(function)
    def apart(*args: Any, **kwargs: Any) -> Any:
        compiler = _set_compiler(None)
        before, _HERE.compiler = _HERE.compiler, compiler or _HERE.compiler
        try:
            return function(*args, **kwargs)
        finally:
            _HERE.compiler = before
            _set_compiler(compiler)

    if not _leave_alone(cast("FunctionType", apart).__code__):
        return uncompiled(function)
    return cast("_Function", _disable(apart, recursive=False))


def _leave_alone(code: CodeType) -> bool:
    """Have torch not compile the frames of a function itself, if it can."""
    if hasattr(_frames, "skip_code"):
        _frames.skip_code(code)
        return True
    if not hasattr(_frames, "set_code_exec_strategy"):
        return False
    skip, as_ever = _frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT
    _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, as_ever))
    return True


def compiled_again(
    function: Callable[..., Any], apart_from: type[TorchFunctionMode], *args: Any, **kwargs: Any
) -> Any:
    """Call a function with the compiler that `itself_uncompiled` has sent away.

    Without modes of the kind ``apart_from``, which torch would compile, too.
    """
    compiler, modes = _HERE.compiler, [] if _modes is None else _modes()
    inner = list(takewhile(lambda mode: isinstance(mode, apart_from), reversed(modes)))
    outer = modes[: len(modes) - len(inner)]
    if compiler is None or any(isinstance(mode, apart_from) for mode in outer):
        return function(*args, **kwargs)
    with ExitStack() as without:
        for _ in inner:
            without.enter_context(_without_mode())
        without.callback(setattr, _HERE, "compiler", compiler)
        _HERE.compiler = None
        _set_compiler(compiler)
        try:
            return function(*args, **kwargs)
        finally:
            _set_compiler(None)


class _Here(threading.local):
    compiler: Any = None  # that waits in this thread


_HERE = _Here()


@contextmanager
def silent(leaves: Iterable[Tensor]) -> Iterator[None]:
    """The leaves' hooks are not called."""
    hooks = [p._backward_hooks for p in leaves if p._backward_hooks]
    saved = [(table, dict(table)) for table in hooks]
    for table in hooks:
        table.clear()
    try:
        yield
    finally:
        for table, entries in saved:
            table.update(entries)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each in memory of its own."""
    listed = list(tensors)
    return list(torch._foreach_mul(listed, 1)) if listed else []


def lengths(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The norm of each."""
    return list(torch._foreach_norm(list(tensors)))


@cache
def sums_wide(device: str) -> bool:
    """Whether a device gives products of bfloat16 in float32 (torch 2.8, on CUDA)."""
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        for stack, multiply in ((one, torch.mm), (one[None], torch.bmm)):
            multiply(stack, stack, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def compile_for_each_layer() -> None:
    """Let torch compile a function for 64 layers that call it: it gives up at the ninth by itself.

    Broken at the layers, a model is no longer compiled as one.
    """
    import torch._dynamo.config as config

    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), 64))


def keep_for_further_passes() -> None:
    """Have compiled code keep what its backward pass reads, where torch lets that write over it.

    Code that was compiled so is dropped, and not taken from a cache, whose keys don't tell.
    """
    import torch._functorch.config as config

    if not getattr(config, "donated_buffer", False):
        return
    config.donated_buffer = False
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    keys: Any = getattr(torch.compiler, "config", None)
    if hasattr(keys, "cache_key_tag"):
        keys.cache_key_tag += "nothing donated"


has_group: Callable[[], bool] = getattr(dist, "is_initialized", lambda: False)


def several_processes() -> bool:
    """Whether more than one trains."""
    return has_group() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """The rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if has_group() else (0, 1)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to some of the model."""
    return any(map(is_sharded_here, model.modules()))


def is_sharded_here(module: nn.Module) -> bool:
    """The same of one module."""
    return "FSDPModule" in names_of_bases(module)


def is_shard(parameter: Tensor) -> bool:
    """Whether this is a DTensor, by name: to import that takes as long as torch."""
    return "DTensor" in names_of_bases(parameter)


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a sharded model."""
    if is_sharded(model):
        raise NotImplementedError(
            f"{what} is not there for a model under fully_shard: expected a whole one, or "
            "DistributedDataParallel"
        )


def names_of_bases(thing: object) -> set[str]:
    """Of the classes that it is of: to import them may take long, or not be possible."""
    return {kind.__name__ for kind in type(thing).__mro__}
