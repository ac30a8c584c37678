"""Compares what an IRWOptimizer did with the oracle."""

from __future__ import annotations

import reference
from torch import nn

from irw_optim import IRWOptimizer


def agree(
    optimizer: IRWOptimizer, model: nn.Module, truth: reference.Step, tolerance: float = 1e-9
) -> None:
    """The record of the last step and every p.grad equal the loop's, within the tolerance."""
    record = optimizer.last_step
    assert record.worst_off.tolist() == truth.worst_off.tolist()
    assert bool(record.fallback) is truth.fallback
    errors = {
        "losses": reference.error(record.losses, truth.losses),
        "scores": reference.error(record.scores, truth.scores),
        "weights": reference.error(record.weights, truth.weights),
    }
    errors |= gradient_errors(model, truth.gradients)
    wrong = {name: value for name, value in errors.items() if not value < tolerance}
    assert not wrong, wrong


def gradient_errors(model: nn.Module, gradients: list) -> dict[str, float]:
    """The error of every p.grad against the gradients of the trainable parameters, in order."""
    # A bias in front of a softmax or a normalisation has no gradient but rounding.
    floor = 0.1 * max(float(g.abs().max()) for g in gradients)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        name: reference.error(
            g.new_zeros(g.shape) if p.grad is None else p.grad.to_dense(), g, floor
        )
        for (name, p), g in zip(trainable, gradients, strict=True)
    }
