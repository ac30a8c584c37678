"""The losses of a batch as a loader yields it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from irw_optim.criterion import PerSampleLosses, per_sample_losses
from irw_optim.distributed.sharding import check_whole

Forward = Callable[[nn.Module, Any], tuple[Any, ...]]
"""``forward(model, batch)`` gives the arguments of the criterion, ``(model(x), y)`` as a rule."""


class BatchLosses:
    """The per-sample losses of a batch as the loader yields it.

    An object and no closure: its copy is about the copy of the model.

    Args:
        model: run on the batch; its parameters decide the device.
        criterion: makes the losses.
        forward: of a batch that is no pair of inputs and target.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, forward: Forward | None) -> None:
        check_whole(model, "a weight for every sample of a data set")
        self.model = model
        self.criterion = criterion
        self.forward = forward

    def __call__(self, batch: Any) -> PerSampleLosses:
        """The losses, with their graph where gradients are enabled."""
        model, arguments = self.model, self.forward or inputs_and_target
        if isinstance(model, DistributedDataParallel):
            model = model.module  # its own forward would wait for a backward pass of every process
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        output, *others = arguments(model, _on(device, batch))
        if others and type(self.criterion).__module__.startswith("torch.nn."):  # tensors alone
            others[0] = as_target(self.criterion, others[0], device)
        return per_sample_losses(self.criterion, output, *others)


def as_target(criterion: nn.Module, target: Any, device: torch.device) -> Any:
    """A target as one of torch's criteria takes it: a tensor, of class numbers where they are due.

    Lists and arrays become tensors, and whole numbers in floating point class numbers, for a
    criterion that takes a vector of them.

    Raises:
        TypeError: a target of another type.
        ValueError: class numbers with fractions.

    >>> as_target(nn.CrossEntropyLoss(), [0.0, 2.0], torch.device("cpu"))
    tensor([0, 2])
    """
    name = type(criterion).__name__
    if not isinstance(target, Tensor):
        try:
            target = torch.as_tensor(target, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name} was given a target of type {type(target).__name__}: expected numbers, one "
                "class a sample; sklearn.preprocessing.LabelEncoder makes numbers of names, and "
                "forward=lambda model, batch: (output, target) takes batches apart"
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
    """The batch with all that has a ``to``, in tuples, lists and mappings too, on the device."""
    return tree_map(
        lambda value: _moved(value, device) if hasattr(value, "to") else value,
        batch,
        is_leaf=lambda value: hasattr(value, "to"),
    )


def _moved(value: Any, device: torch.device) -> Any:
    """On the device; from pinned memory the copy goes on while the host does."""
    if isinstance(value, torch.Tensor) and value.is_pinned():
        return value.to(device, non_blocking=True)
    return value.to(device)


def inputs_and_target(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """What the criterion is called with, of a batch that is a pair."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        shape = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise TypeError(
            f"the loader's batches are no pairs (inputs, target) but a {shape}: give "
            'forward=lambda model, batch: (model(batch["x"]), batch["y"]), which returns the '
            "criterion's arguments"
        )
    inputs, target = batch
    return model(inputs), target
