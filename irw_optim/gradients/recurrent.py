"""Recurrent layers without cuDNN, whose backward pass has no derivative.

Torch's own kernels compute the same, and changes go forwards through them: a few plain steps, and
not one backward pass a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from irw_optim.attachments import Attachment, Removable, replace_on
from irw_optim.gradients.compiling import KeptOut

IN_CUDNN = "CudnnRnn"
"""What autograd calls them."""


class WithoutCudnn(Attachment):
    """Has a recurrent layer take torch's own kernels while gradients are recorded."""

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Attach, and yield what removes it."""
        yield replace_on(module, "forward", _OwnKernels(module))


class _OwnKernels(KeptOut):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes."""
        with torch.backends.cudnn.flags(enabled=not torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)


def without_cudnn(model: nn.Module) -> list[Attachment]:
    """Keep the recurrent layers of a model that still use cuDNN from it; none where all do so.

    They stay so for as long as somebody holds what is returned.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return [WithoutCudnn.on(layer) for layer in layers if WithoutCudnn.found_on(layer) is None]
