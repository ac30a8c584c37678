"""What each loss does between its elements and its value: one short rule per kind of loss.

A rule gets the criterion, its unreduced elements (B·k, ...), the number of samples and the
arguments of the call. To add one::

    @rule_for(MyLoss)
    def _my_loss(criterion, elements, batch, input, target):
        return fold(elements, batch, criterion.reduction, normaliser=...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from irw_optim.criterion._calls import forward_of
from irw_optim.criterion._folding import PerSampleLosses, flat, fold

Compute: TypeAlias = Callable[..., PerSampleLosses]


class Rule(NamedTuple):
    """How a kind of criterion gets from elements to its value.

    Attributes:
        compute: (criterion, elements, batch, *args, **kwargs) -> PerSampleLosses.
        reductions: Those it has, ``"none"`` apart.
        trusted: Whether its elements are known to be one row or more a sample.
    """

    compute: Compute
    reductions: tuple[str, ...] = ("mean", "sum")
    trusted: bool = True


RULES: dict[type[nn.Module], Rule] = {}


def rule_for(
    *kinds: type[nn.Module], reductions: tuple[str, ...] = ("mean", "sum"), trusted: bool = True
) -> Callable[[Compute], Compute]:
    """Registers the decorated rule for the given kinds of criterion."""

    def register(compute: Compute) -> Compute:
        RULES.update((kind, Rule(compute, reductions, trusted)) for kind in kinds)
        return compute

    return register


def find_rule(criterion: nn.Module) -> Rule | None:
    """The rule of the criterion's class, or of the class whose `forward` it inherits."""
    kind = type(criterion)
    if "forward" in vars(criterion):  # put there by somebody; whose, if not the class's?
        own = forward_of(criterion)
        if getattr(own, "__func__", None) is not getattr(kind, "forward", None):
            return None
    if (rule := RULES.get(kind)) is not None:
        return rule
    # A subclass with a forward of its own (a focal loss on CrossEntropyLoss) is another loss.
    for base in kind.__mro__:
        if base in RULES and kind.forward is base.forward:
            return RULES[base]
    return None


@rule_for(
    nn.CosineEmbeddingLoss,
    nn.GaussianNLLLoss,
    nn.HingeEmbeddingLoss,
    nn.HuberLoss,
    nn.L1Loss,
    nn.MarginRankingLoss,
    nn.MSELoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
)
def plain(criterion: Any, elements: Tensor, batch: int, *_: Any, **__: Any) -> PerSampleLosses:
    """The mean or the sum of all elements."""
    return fold(elements, batch, criterion.reduction)


@rule_for(nn.BCELoss, nn.BCEWithLogitsLoss)
def _binary(
    criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
) -> PerSampleLosses:
    labels = _labels(target, batch, threshold=0.5)
    return fold(elements, batch, criterion.reduction, labels=labels)


@rule_for(nn.SoftMarginLoss)
def _signed_binary(
    criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
) -> PerSampleLosses:
    labels = _labels(target, batch, threshold=0.0)
    return fold(elements, batch, criterion.reduction, labels=labels)


@rule_for(nn.MultiMarginLoss)
def _multi_margin(
    criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
) -> PerSampleLosses:
    # Unlike the cross entropy, its mean divides by the number of samples, class weights or not.
    return fold(elements, batch, criterion.reduction, labels=_labels(target, batch))


@rule_for(nn.CrossEntropyLoss, nn.NLLLoss)
def _cross_entropy(
    criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
) -> PerSampleLosses:
    if target.is_floating_point():  # class probabilities: nothing ignored, a plain mean
        return fold(elements, batch, criterion.reduction)
    # LinearCrossEntropyLoss writes None for torch's default.
    ignore_index = -100 if criterion.ignore_index is None else criterion.ignore_index
    valid = target != ignore_index
    normaliser = None
    if (weight := criterion.weight) is not None:
        # ignore_index need not be a class: look up class 0 there and strike it out.
        weights = weight.detach()[target.masked_fill(~valid, 0).long()]
        normaliser = (weights * valid).sum()
    everything = valid.device.type == "cpu" and bool(valid.all())  # looking waits for nothing
    return fold(
        elements,
        batch,
        criterion.reduction,
        valid=None if everything else valid,
        normaliser=normaliser,
        labels=_labels(target, batch),
    )


if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the lowest torch supported
    rule_for(nn.LinearCrossEntropyLoss)(_cross_entropy)


@rule_for(nn.KLDivLoss, reductions=("mean", "sum", "batchmean"))
def _kl_div(
    criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
) -> PerSampleLosses:
    normaliser = float(input.shape[0]) if criterion.reduction == "batchmean" else None
    return fold(elements, batch, criterion.reduction, normaliser=normaliser)


@rule_for(nn.CTCLoss)
def _ctc(
    criterion: Any,
    elements: Tensor,
    batch: int,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
) -> PerSampleLosses:
    # The elements are sums over the symbols of a target; torch's mean divides each by the length
    # (at least 1) of its target, which is the mean over a sample's own elements.
    if batch != elements.shape[0]:
        raise ValueError(
            f"batch_size={batch} must be {elements.shape[0]}: CTCLoss has one loss per sequence"
        )
    lengths = torch.as_tensor(target_lengths, device=elements.device).reshape(-1).clamp(min=1)
    means = fold(elements / lengths, batch, "mean")
    if criterion.reduction == "mean":
        return means
    scale = lengths.sum().to(elements.dtype)
    total = elements.detach().sum()
    return means._replace(
        value=total, scale=scale, counts=lengths, elements=lengths.sum(), summed=True
    )


def _labels(target: Tensor, batch: int, threshold: float | None = None) -> Tensor | None:
    """Classes (B,) if the target is one number a sample; 1 above the threshold for two classes."""
    if target.numel() != batch:
        return None
    return flat(target if threshold is None else target > threshold).long()
