"""What each loss does between its elements and its value: one short rule per kind of loss.

A rule gets the criterion, its unreduced elements (B·k, ...), the number of samples and the
arguments of the call; `RULES` says which kind has which.
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
    """How a kind of criterion gets from elements to its value, by the reductions that it has.

    It is trusted where its elements are known to be one row or more a sample.
    """

    compute: Compute
    reductions: tuple[str, ...] = ("mean", "sum")
    trusted: bool = True


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


def plain(criterion: Any, elements: Tensor, batch: int, *_: Any, **__: Any) -> PerSampleLosses:
    """The mean or the sum of all elements."""
    return fold(elements, batch, criterion.reduction)


def labelled(threshold: float | None = None) -> Compute:
    """The same, with a target that may tell classes: two, by a threshold, or those it names."""

    def rule(
        criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
    ) -> PerSampleLosses:
        labels = _labels(target, batch, threshold)
        return fold(elements, batch, criterion.reduction, labels=labels)

    return rule


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


def _kl_div(
    criterion: Any, elements: Tensor, batch: int, input: Tensor, target: Tensor
) -> PerSampleLosses:
    normaliser = float(input.shape[0]) if criterion.reduction == "batchmean" else None
    return fold(elements, batch, criterion.reduction, normaliser=normaliser)


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


RULES: dict[type[nn.Module], Rule] = {
    nn.BCELoss: Rule(labelled(0.5)),
    nn.BCEWithLogitsLoss: Rule(labelled(0.5)),
    nn.CosineEmbeddingLoss: Rule(plain),
    nn.CrossEntropyLoss: Rule(_cross_entropy),
    nn.CTCLoss: Rule(_ctc),
    nn.GaussianNLLLoss: Rule(plain),
    nn.HingeEmbeddingLoss: Rule(plain),
    nn.HuberLoss: Rule(plain),
    nn.KLDivLoss: Rule(_kl_div, ("mean", "sum", "batchmean")),
    nn.L1Loss: Rule(plain),
    nn.MarginRankingLoss: Rule(plain),
    nn.MSELoss: Rule(plain),
    nn.MultiLabelMarginLoss: Rule(plain),
    nn.MultiLabelSoftMarginLoss: Rule(plain),
    # Unlike the cross entropy's, its mean divides by the number of samples, class weights or not.
    nn.MultiMarginLoss: Rule(labelled()),
    nn.NLLLoss: Rule(_cross_entropy),
    nn.PoissonNLLLoss: Rule(plain),
    nn.SmoothL1Loss: Rule(plain),
    nn.SoftMarginLoss: Rule(labelled(0.0)),
    nn.TripletMarginLoss: Rule(plain),
    nn.TripletMarginWithDistanceLoss: Rule(plain),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the lowest torch supported
    RULES[nn.LinearCrossEntropyLoss] = Rule(_cross_entropy)
