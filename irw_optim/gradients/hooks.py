"""What an engine needs on its model, and for how long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from irw_optim.attachments import Attachment, Removable
from irw_optim.gradients.compiling import KeptOut, OnForward
from irw_optim.gradients.packed import packed_as_one


def needed_on(model: nn.Module | None) -> list[Attachment]:
    """What any engine needs, for as long as somebody holds it."""
    if model is None:
        return []
    silence: list[Attachment] = (
        [OpacusSilenced.on(model)] if hasattr(model, "hooks_enabled") else []
    )
    return [*silence, *packed_as_one(model)]


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


def weighed_by(model: nn.Module) -> WeakSet[Any]:
    """The engines that live and have a model's gradients to weigh, whether it has hooks or not."""
    return _WEIGHED_BY.setdefault(model, WeakSet())


_WEIGHED_BY: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


IN_CUDNN = "CudnnRnn"
"""What autograd calls them."""


class _OwnKernels(KeptOut):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=not torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)


class WithoutCudnn(OnForward):
    """Has a recurrent layer take torch's own kernels while gradients are recorded.

    cuDNN's backward pass has no derivative. Through torch's own, changes go forwards: a few plain
    steps, and not one backward pass a sample.
    """

    stands_in = _OwnKernels


WITHOUT_CUDNN = (
    "recurrent layers take torch's own kernels from now on, through which changes go forwards: the "
    "gradient of cuDNN's cannot be differentiated, and would take one backward pass a sample"
)


def without_cudnn(model: nn.Module) -> list[Attachment]:
    """Keep the recurrent layers that still use cuDNN from it, until nobody holds these."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return [WithoutCudnn.on(layer) for layer in layers if WithoutCudnn.found_on(layer) is None]
