"""The losses of a loader's batch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from irw_optim.criterion import PerSampleLosses, per_sample_losses
from irw_optim.restored import randomness_restored
from irw_optim.torch_internals import check_whole

logger = logging.getLogger("irw_optim")

_warned: WeakSet[nn.Module] = WeakSet()

Forward = Callable[[nn.Module, Any], tuple[Any, ...]]
"""``forward(model, batch)`` gives the criterion's arguments, ``(model(x), y)`` as a rule."""


class BatchLosses:
    """The per-sample losses of a batch; its copy is about the model's copy."""

    def __init__(self, model: nn.Module, criterion: nn.Module, forward: Forward | None) -> None:
        check_whole(model, "a weight for every sample of a data set")
        self.model, self.criterion = model, criterion
        self.forward = inputs_and_target if forward is None else forward
        if not callable(self.forward):
            raise TypeError(f"forward={forward!r}: expected forward(model, batch) or None")

    def __call__(self, batch: Any) -> PerSampleLosses:
        """The losses, with a graph where gradients are enabled."""
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module  # its forward would wait for a backward pass of every process
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        output, *others = self.forward(model, _on(device, batch))
        if others and type(self.criterion).__module__.startswith("torch.nn."):
            others[0] = _as_target(self.criterion, others[0], device)
        return per_sample_losses(self.criterion, output, *others)


def _as_target(criterion: nn.Module, target: Any, device: torch.device) -> Any:
    """A target as torch's criteria take it."""
    name = type(criterion).__name__
    if not isinstance(target, Tensor):
        try:
            target = torch.as_tensor(target, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} was given a target of type {type(target).__name__}: expected numbers, one "
                "class a sample (sklearn.preprocessing.LabelEncoder makes them of names), or "
                "forward=lambda model, batch: (output, target)"
            ) from error
    numbers = isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss | nn.MultiMarginLoss)
    if not numbers or target.ndim != 1 or target.dtype in (torch.int64, torch.uint8):
        return target
    if target.is_floating_point() and bool((target != target.round()).any()):
        raise ValueError(
            f"{name} was given the target {target[target != target.round()][0]:g}: expected class "
            "numbers 0, 1, 2, ..., one a sample"
        )
    return target.long()


def _on(device: torch.device, batch: Any) -> Any:

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_pinned():
            return value.to(device, non_blocking=True)  # the host goes on meanwhile
        return value.to(device) if hasattr(value, "to") else value

    return tree_map(moved, batch, is_leaf=lambda value: hasattr(value, "to"))


def inputs_and_target(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """The criterion's arguments, of a pair."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        shape = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise TypeError(
            f"the loader's batches are no pairs (inputs, target) but a {shape}: give "
            'forward=lambda model, batch: (model(batch["x"]), batch["y"])'
        )
    inputs, target = batch
    return model(inputs), target


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, which leaves no trace."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            warn_once(
                model,
                f"{name} ({type(module).__name__}) has no running statistics, and makes the "
                "weights depend on batch size and order; use track_running_stats=True",
            )
    number = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    devices = {torch.device("cuda", i) for i in range(number)}
    devices |= {parameter.device for parameter in model.parameters()}
    with randomness_restored(devices), ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # CuDNN has no backward for recurrent layers in eval mode.
            undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        model.eval()
        yield


def warn_once(model: nn.Module, message: str) -> None:
    """Log one warning for a model."""
    if model not in _warned:
        _warned.add(model)
        logger.warning("%s", message)


def in_full_precision(model: nn.Module) -> bool:
    """Whether all is float32 or better."""
    parameters = list(model.parameters())
    return all(p.dtype in (torch.float32, torch.float64) for p in parameters) and not any(
        torch.is_autocast_enabled(device) for device in {p.device.type for p in parameters}
    )
