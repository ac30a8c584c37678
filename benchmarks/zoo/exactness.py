"""An IRW step in float64 against a loop of plain autograd over the losses.

The loop is written from the definitions alone: one backward pass for each loss of the batch, on
one graph, so that it holds where samples mix, as under BatchNorm.
"""

from __future__ import annotations

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
    expected_weights, expected = reference(entry, InFloat64(entry.make()), batch)
    model = InFloat64(entry.make())
    ours = Loop.of(entry, model, batch, ALPHA)
    for _ in range(USES):
        torch.manual_seed(2)
        ours.backward()
    weights_error, gradient_error = differences(ours, expected_weights, expected)
    return {"exact_size": size, "weights_error": weights_error, "gradient_error": gradient_error}


def differences(ours: Loop, weights: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
    """Of the weights and gradients of the last step, relative to the largest number expected."""
    parameters = [p for p in ours.model.parameters() if p.requires_grad]
    largest = max(float(g.abs().max()) for g in gradients)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    off = _largest((ours.optimizer.last_step.weights - weights) / weights.max())
    return off, max(
        _largest((g - e) / (largest or 1.0)) for g, e in zip(found, gradients, strict=True)
    )


def reference(entry: Entry, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Weights (B,) and the weighted gradient, by one backward pass for each loss."""
    inputs, target = batch
    torch.manual_seed(2)
    output = model(*inputs)
    per_sample = entry.losses or partial(nn.functional.cross_entropy, reduction="none")
    losses = per_sample(output, target)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    G = torch.stack(rows)
    weights = irw(losses.detach(), G)
    combined = (weights @ G).split([p.numel() for p in parameters])
    return weights, [g.view_as(p) for g, p in zip(combined, parameters, strict=True)]


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
