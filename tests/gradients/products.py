"""The three products with G as the engines give them, measured from where users can see them.

A weighting rule is handed the per-sample gradients of the batch: a rule that multiplies with them
and notes the results sees exactly what the library computes with, whatever the engine behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import reference
import torch
from torch import Tensor, nn

from irw_optim import IRWOptimizer
from irw_optim.gradients import PerSampleGradients
from irw_optim.gradients.protocol import align


class Products(NamedTuple):
    """G^T u, G v, G v with one parameter of v alone, G G^T u, and G G^T."""

    combine: Tensor
    dot: Tensor
    partial_dot: Tensor
    align: Tensor
    gram: Tensor


def measured(
    model: nn.Module, losses_of: Callable[[nn.Module], Tensor], engine: str, u: Tensor, v: Tensor
) -> tuple[Products, list[Tensor]]:
    """The products through an IRWOptimizer, and the p.grad that weights |u| / sum |u| leave.

    Args:
        model: hooked and unhooked again.
        losses_of: runs the model and returns losses (B,).
        engine: of IRWOptimizer.
        u: (B,), for G^T u.
        v: (P,), for G v.
    """
    parameters = trainable(model)
    seen: list[Products] = []

    def probe(losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        direction = dict(zip(parameters, parts_of(v, parameters), strict=True))
        combined = gradients.combine(u.to(losses.dtype))
        seen.append(
            Products(
                torch.cat([dense(combined[p]).flatten().double() for p in parameters]),
                gradients.dot(direction),
                gradients.dot({parameters[0]: direction[parameters[0]]}),
                align(gradients, u.to(losses.dtype)),
                gradients.gram(),
            )
        )
        return u.abs().to(losses.dtype)

    optimizer = IRWOptimizer(
        torch.optim.SGD(parameters, lr=0.1), alpha=0.5, model=model, engine=engine, weighting=probe
    )
    optimizer.zero_grad()
    optimizer.backward(losses_of(model))
    optimizer.detach()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return seen[0], [dense(g) for g in gradients]


def expected(
    model: nn.Module, losses_of: Callable[[nn.Module], Tensor], u: Tensor, v: Tensor
) -> tuple[Products, list[Tensor]]:
    """The same by a loop of plain autograd over the samples."""
    parameters = trainable(model)
    G = reference.per_sample_gradients(losses_of(model), parameters).double()
    v = v.double()
    first = torch.zeros_like(v)
    first[: parameters[0].numel()] = v[: parameters[0].numel()]
    w = u.abs() / u.abs().sum()
    gradients = parts_of(w @ G, parameters)
    return Products(u @ G, G @ v, G @ first, G @ (u @ G), G @ G.T), gradients


def check(
    model: nn.Module,
    losses_of: Callable[[nn.Module], Tensor],
    engine: str,
    tolerance: float,
    batch: int,
    every: int = 3,
    but: int = 1,
) -> None:
    """Compare all of it, for weights some of which are negative.

    Args:
        model: and the others: as of `measured`.
        losses_of: runs the model.
        engine: of IRWOptimizer.
        tolerance: of relative errors.
        batch: B.
        every: of so many samples in a row ...
        but: ... so many have weight 0.
    """
    parameters = trainable(model)
    u = torch.randn(batch, dtype=torch.float64) * ((torch.arange(batch) + 1) % every >= but)
    v = torch.randn(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    truth, gradients_by_loop = expected(model, losses_of, u, v)
    ours, gradients = measured(model, losses_of, engine, u, v)
    errors = {
        name: reference.error(getattr(ours, name), getattr(truth, name)) for name in ours._fields
    }
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    # A bias in front of a softmax or a normalisation has no gradient but rounding.
    floor = 0.1 * max(float(g.abs().max()) for g in gradients_by_loop)
    for name, actual, right in zip(names, gradients, gradients_by_loop, strict=True):
        errors[f"{name}.grad"] = reference.error(actual, right, floor)
    wrong = {name: value for name, value in errors.items() if not value < tolerance}
    assert not wrong, wrong


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def parts_of(vector: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
