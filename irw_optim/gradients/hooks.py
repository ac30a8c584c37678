"""What an engine needs on its model, and for how long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from irw_optim.attachments import Attachment, Removable


def silence_of(model: nn.Module | None) -> list[Attachment]:
    """Keeps Opacus' hooks quiet for as long as somebody holds it."""
    return [OpacusSilenced.on(model)] if hasattr(model, "hooks_enabled") else []


def needs_hooks(model: nn.Module) -> bool:
    """Whether layers have to be seen as they are called: compiled, the graph does not show them."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


class OpacusSilenced(Attachment):
    """Opacus' hooks make rows that nobody reads here, and trip over passes within a pass."""

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Switch them off, and yield what switches them on again."""
        if module.hooks_enabled:
            module.disable_hooks()  # type: ignore[operator]
            yield _Silence(module)


class _Silence:
    def __init__(self, module: nn.Module) -> None:
        self.module = ref(module)

    def remove(self) -> None:
        module = self.module()
        if module is not None:
            module.enable_hooks()  # type: ignore[operator]

    def clean(self, state: dict[str, Any]) -> None:
        state["hooks_enabled"] = True


def is_compiled(node: Node) -> bool:
    """Whether a node is the backward pass of a region that torch.compile made."""
    return isinstance(node, BackwardCFunction) and node.name().startswith("CompiledFunction")
