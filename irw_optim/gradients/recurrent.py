"""Recurrent layers without cuDNN, whose backward pass has no derivative.

Torch's own kernels compute the same, and changes go forwards through them: a few plain steps, and
not one backward pass a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from irw_optim.attachments import Attachment
from irw_optim.gradients.compiling import KeptOut, OnForward

IN_CUDNN = "CudnnRnn"
"""What autograd calls them."""


class _OwnKernels(KeptOut):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=not torch.is_grad_enabled()):
            return self.__wrapped__(*args, **kwargs)


class WithoutCudnn(OnForward):
    """Has a recurrent layer take torch's own kernels while gradients are recorded."""

    stands_in = _OwnKernels


def without_cudnn(model: nn.Module) -> list[Attachment]:
    """Keep the recurrent layers that still use cuDNN from it, until nobody holds these."""
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    return [WithoutCudnn.on(layer) for layer in layers if WithoutCudnn.found_on(layer) is None]
