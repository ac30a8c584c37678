"""The losses of a batch as a loader yields it, and whether they are the same in every batch.

The weights of a data set are the same for any batch size, unless the forward mixes the samples,
pads them to the longest without a mask, or is given other views of them in every pass. A sample is
read two or three times, each time in another batch, and its losses are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from irw_optim.criterion import PerSampleLosses, per_sample_losses
from irw_optim.processes import check_whole
from irw_optim.restored import randomness_restored

logger = logging.getLogger("irw_optim")

_warned: WeakSet[nn.Module] = WeakSet()

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Of the mean loss: far above what another kernel for another batch size rounds differently."""

_LOW_PRECISION = 0.1

Forward = Callable[[nn.Module, Any], tuple[Any, ...]]
"""``forward(model, batch)`` gives the arguments of the criterion, ``(model(x), y)`` as a rule."""


class BatchLosses:
    """The per-sample losses of a batch; no closure, for its copy is about the model's copy."""

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
    """A target as a criterion of torch takes it: numbers as a tensor, classes as int64."""
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

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_pinned():
            return value.to(device, non_blocking=True)  # the host goes on meanwhile
        return value.to(device) if hasattr(value, "to") else value

    return tree_map(moved, batch, is_leaf=lambda value: hasattr(value, "to"))


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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, where a sample's gradient is its own; afterwards no trace is left."""
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


def _warn_of_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            _warn_once(
                model,
                "%s (%s) has no running statistics and normalises by the batch even in eval mode: "
                "the weights depend on the batch size and on the order of the data set; use "
                "track_running_stats=True",
                name,
                type(module).__name__,
            )
            return


def _warn_once(model: nn.Module, message: str, *arguments: object) -> None:
    if model not in _warned:
        _warned.add(model)
        logger.warning(message, *arguments)


class LossConsistency:
    """The losses of N samples in all batches, and by how much those of one sample differ."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._batches: list[tuple[Tensor, Tensor]] = []

    def note(self, samples: Tensor, losses: Tensor) -> None:
        """Take the losses (b,) of these samples (b,), dataset indices on the CPU."""
        self._batches.append((samples, forward_ad.unpack_dual(losses.detach()).primal))

    def differing_batches(self, full_precision: bool) -> list[list[int]]:
        """The batches with the sample whose losses differ most, if they do so beyond rounding."""
        difference, sample, mean = self._most_different()
        tolerance = _TOLERANCE.get(mean.dtype, _LOW_PRECISION) if full_precision else _LOW_PRECISION
        if not float(difference) > tolerance * abs(float(mean)):
            return []
        batches = [samples.tolist() for samples, _ in self._batches]
        return [batch for batch in batches if int(sample) in batch]

    def warn(self, model: nn.Module) -> None:
        """Say, once for a model, what that means for its weights."""
        difference, _, mean = self._most_different()
        _warn_once(
            model,
            "a sample's loss differs by up to %.2g (the mean loss is %.2g) from one batch to "
            "another: the forward mixes the samples of a batch, pads them without a mask, or "
            "data set, collate_fn or model draw at random. The weights depend on the batch "
            "size, on the order of the data set or on the draws; use a model in which each "
            "sample stands for itself, and leave random augmentation out of the scoring",
            float(difference),
            float(mean),
        )

    def _most_different(self) -> tuple[Tensor, Tensor, Tensor]:
        """The largest difference, whose it is, and the mean loss, all 0-dim."""
        losses = torch.cat([losses for _, losses in self._batches]).cpu()
        samples = torch.cat([samples for samples, _ in self._batches])
        nothing = losses.new_full((self._size,), -torch.inf)
        most = nothing.scatter_reduce(0, samples, losses, "amax")
        least = nothing.neg().scatter_reduce(0, samples, losses, "amin")
        difference = (most - least).nan_to_num(0.0, neginf=0.0)  # of some nothing is known
        return *difference.max(0), least[least.isfinite()].mean()
