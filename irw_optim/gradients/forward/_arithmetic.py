"""Changes through elementwise functions, softmax and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.forward._registry import Tangents, forward_rule, of_one_input
from irw_optim.gradients.nodes import pull, read_by, signed


def diagonal(node: Any, tangents: Tangents) -> Tensor | None:
    """Every number of the output depends on one of each input: the node's pull is its push."""
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    ((number, tangent), *more), (output, *others) = changing, node._input_metadata
    if more or read_by(node, number).shape != output.shape:
        return None  # it would take a pull each; a broadcast input may get a sum
    if tangent.dtype != output.dtype:
        tangent = tangent.to(output.dtype)
    return pull(node, [tangent, *[None] * len(others)])[number]


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
    if getattr(node, "_saved_rounding_mode", None) is not None:
        return None
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    bottom: Tensor = node._saved_other
    if left is not None and right is None:
        return left / bottom
    assert right is not None
    quotient: Tensor = node._saved_self / bottom
    return (-right * quotient if left is None else left - right * quotient) / bottom


@forward_rule("Where")
def _where(node: Any, tangents: Tangents) -> Tensor:
    left, right = (0.0 if t is None else t for t in tangents)
    return torch.where(node._saved_condition, left, right)


@forward_rule("MaskedFill")
def _masked(node: Any, tangents: Tangents) -> Tensor:
    elsewhere, value = (0.0 if t is None else t for t in (*tangents, None)[:2])
    return torch.where(node._saved_mask, value, elsewhere)


@forward_rule("Fill")
def _filled(node: Any, tangents: Tangents) -> Tensor:
    value = tangents[1] if len(tangents) > 1 else None
    output = node._input_metadata[0]
    return torch.zeros((), dtype=output.dtype, device=output.device) if value is None else value


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


@of_one_input("CtcLoss", "MultiMarginLoss", "MultilabelMarginLoss")
def _of_separate_samples(node: Any, change: Tensor) -> Tensor:
    """Each loss depends on its own sample alone: one pull has the gradients of all."""
    output, *others = node._input_metadata
    ones = torch.ones(output.shape, dtype=output.dtype, device=output.device)
    (gradient, *_) = pull(node, [ones, *[None] * len(others)])
    assert gradient is not None
    batch_dim = 1 if node.name().startswith("Ctc") else 0
    return (gradient * change).movedim(batch_dim, 0).reshape(*output.shape, -1).sum(-1)
