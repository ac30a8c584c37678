"""An IRW step in float64 against a loop of plain autograd over the losses.

The loop is written from the definitions alone: one backward pass for each loss of the batch, on
one graph, so that it holds where samples mix, as under BatchNorm.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.cost.neighbours import ALPHA
from benchmarks.zoo.entry import Batch, Entry
from benchmarks.zoo.measuring import Loop

LARGEST = 10
"""The loop takes no more samples than this."""

USES = 3
"""The third use is compared: the library checks itself at the first two."""


class Float64(TorchFunctionMode):
    """Computes in float64 what a model computes in float32 whatever its parameters are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class InFloat64(nn.Module):
    """A model that computes in float64 throughout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, *inputs: Tensor) -> Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with Float64():
                return self.model(*inputs)
        finally:
            torch.set_default_dtype(default)


def errors(entry: Entry, size: int) -> dict[str, float | int]:
    """Largest differences of weights and gradients, relative to the largest number expected."""
    size = min(size, LARGEST)
    batch = in_double(entry.draw(size))
    expected = reference(entry, InFloat64(entry.make()), batch)
    ours = Loop.of(entry, InFloat64(entry.make()), batch, ALPHA)
    for _ in range(USES):
        torch.manual_seed(2)
        ours.backward()
    names = ("weights_error", "gradient_error")
    return {"exact_size": size, **dict(zip(names, differences(ours, *expected), strict=True))}


def differences(ours: Loop, weights: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Of the weights and gradients of the last step, relative to the largest number expected."""
    parameters = [p for p in ours.model.parameters() if p.requires_grad]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    off = torch.cat([g.flatten() for g in found]) - gradient
    return (
        _largest((ours.optimizer.last_step.weights - weights) / weights.max()),
        _largest(off / (float(gradient.abs().max()) or 1.0)),
    )


def reference(entry: Entry, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weights (B,) and the weighted gradient (P,), by one backward pass for each loss."""
    inputs, target = batch
    torch.manual_seed(2)
    output = model(*inputs)
    per_sample = entry.losses or partial(nn.functional.cross_entropy, reduction="none")
    losses = per_sample(output, target)
    parameters = [p for p in model.parameters() if p.requires_grad]
    all_of = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    rows = (torch.autograd.grad(loss, parameters, **all_of) for loss in losses)
    G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    weights = irw(losses.detach(), G)
    return weights, weights @ G


def irw(losses: Tensor, G: Tensor) -> Tensor:
    """w_i proportional to max(0, <g_i, g_S>), S the ceil(alpha B) largest losses."""
    count = max(1, math.ceil(round(ALPHA * len(losses), 9)))
    worst_off = losses.argsort(descending=True, stable=True)[:count]
    scores = (G @ G[worst_off].sum(0)).clamp(min=0)
    total = scores.sum()
    return scores / total if total > 0 else torch.full_like(losses, 1 / len(losses))


def _largest(difference: Tensor) -> float:
    """Infinite where it is not a number."""
    largest = float(difference.abs().max())
    return math.inf if math.isnan(largest) else largest


def in_double(batch: Batch) -> Batch:
    """What a model in float64 is called with."""
    *inputs, target = (t.double() if t.is_floating_point() else t for t in (*batch[0], batch[1]))
    return tuple(inputs), target
