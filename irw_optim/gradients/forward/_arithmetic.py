"""Changes through elementwise functions, softmax and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.forward._registry import Tangents, forward_rule, of_one_input
from irw_optim.gradients.nodes import pull, shape_of, signed


def diagonal(node: Any, tangents: Tangents) -> Tensor | None:
    """Every number of the output depends on one of each input: the node's pull is its push."""
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    if len(changing) > 1:  # it would take a pull each, and what is recomputed is handed out once
        return None
    ((number, tangent),) = changing
    output, *others = node._input_metadata
    gradient = tangent.to(output.dtype).expand(shape_of(node))
    change = pull(node, [gradient, *[None] * len(others)])[number]
    return change if change is not None and change.shape == gradient.shape else None


def of_single_losses(node: Any, tangents: Tangents) -> Tensor | None:
    """Elementwise, unless the losses are averaged."""
    return None if node._saved_reduction else diagonal(node, tangents)


@of_one_input("Softmax", "SafeSoftmax")
def _softmax(node: Any, change: Tensor) -> Tensor:
    result: Tensor = node._saved_result
    change = result * change.to(result.dtype)
    return change - result * change.sum(signed(node._saved_dim), keepdim=True)


@of_one_input("LogSoftmax")
def _log_softmax(node: Any, change: Tensor) -> Tensor:
    result: Tensor = node._saved_result
    change = change.to(result.dtype)
    return change - (result.exp() * change).sum(signed(node._saved_dim), keepdim=True)


@forward_rule("Add", "Sub")
def _sum(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    alpha: float = getattr(node, "_saved_alpha", 1) * (-1 if node.name().startswith("Sub") else 1)
    if left is not None and right is not None:
        return torch.add(left, right, alpha=alpha)
    return left if right is None or alpha == 1 else right * alpha


@forward_rule("Mul")
def _product(node: Any, tangents: Tangents) -> Tensor:
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    total: Tensor | None = None if left is None else left * node._saved_other
    if right is None:
        assert total is not None
        return total
    values: Tensor = node._saved_self
    return right * values if total is None else torch.addcmul(total, right, values)


@forward_rule("Div")
def _quotient(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    if right is None or getattr(node, "_saved_rounding_mode", None) is not None:
        return diagonal(node, tangents)
    bottom: Tensor = node._saved_other
    quotient: Tensor = node._saved_self / bottom
    return (-right * quotient if left is None else left - right * quotient) / bottom


@forward_rule("Where")
def _where(node: Any, tangents: Tangents) -> Tensor:
    left, right = (0.0 if t is None else t for t in tangents)
    return torch.where(node._saved_condition, left, right)


@of_one_input("NllLoss", "NllLoss2D")
def _negative_likelihood(node: Any, change: Tensor) -> Tensor | None:
    if node._saved_reduction or change.ndim < 2:
        return None
    target, weight = node._saved_target, node._saved_weight
    ignored = target == signed(node._saved_ignore_index)
    labels = target.masked_fill(ignored, 0)
    picked = change.gather(1, labels.unsqueeze(1)).squeeze(1)
    picked = -picked if weight is None else picked * -weight[labels]
    return picked.masked_fill(ignored, 0.0)


@of_one_input("CtcLoss")
def _alignment_loss(node: Any, change: Tensor) -> list[Tensor | None]:
    """Each loss depends on its own sequence: (T, B, classes), or (T, classes)."""
    output, *others = node._input_metadata
    ones = torch.ones(output.shape, dtype=output.dtype, device=output.device)
    gradient = pull(node, [ones, *[None] * len(others)])[0]
    assert gradient is not None
    return [(gradient * change).sum((0, -1)), *[None] * len(others)]
