"""What an engine needs on its model, and for how long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import nn

from irw_optim.attachments import Attachment, Removable
from irw_optim.gradients.capture import hook_layers


def hooks_of(model: nn.Module | None, kind: str) -> list[Attachment] | None:
    """Attached for as long as somebody holds them; None while the model is still being copied."""
    if model is None:
        return []
    if "_modules" not in vars(model):
        return None
    hooks = [] if kind == "autodiff" else hook_layers(model)
    return [*hooks, OpacusSilenced.on(model)] if hasattr(model, "hooks_enabled") else hooks


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
