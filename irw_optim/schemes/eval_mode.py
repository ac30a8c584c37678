"""A look at a model in training, in eval mode, that leaves no trace on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from irw_optim.restored import randomness_restored

logger = logging.getLogger("irw_optim")

_warned: WeakSet[nn.Module] = WeakSet()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and every random state are as before.

    Eval mode is what makes a sample's gradient its own: with BatchNorm in train mode it would
    depend on who else is in the batch, with dropout on the draw.

    Args:
        model: every submodule gets its own mode back, not the model's.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with eval_mode(model):
    ...     model[0].training
    False
    >>> model.training, model[0].training, model[1].training
    (True, True, False)
    """
    _warn_of_batch_statistics(model)
    modes = [(module, module.training) for module in model.modules()]
    number = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    devices = {torch.device("cuda", i) for i in range(number)}
    devices |= {parameter.device for parameter in model.parameters()}
    try:
        with randomness_restored(devices), _recurrent_backward_in_eval_mode(model):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _recurrent_backward_in_eval_mode(model: nn.Module) -> Any:
    """CuDNN has no backward for recurrent layers in eval mode; torch's own kernels have."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


def warn_once(model: nn.Module, message: str, *arguments: object) -> None:
    """Say why the weights of this model's data set are not what they should be, if nobody has."""
    if model not in _warned:
        _warned.add(model)
        logger.warning(message, *arguments)


def _warn_of_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            warn_once(
                model,
                "%s (%s) has no running statistics and normalises by the batch even in eval mode: "
                "the weights depend on the batch size and on the order of the data set; use "
                "track_running_stats=True",
                name,
                type(module).__name__,
            )
            return
