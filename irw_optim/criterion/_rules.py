"""From a criterion's unreduced elements, (B·k, ...), to one loss per sample."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from irw_optim.torch_internals import is_plain_autograd

_HALVES = (torch.float16, torch.bfloat16)


class PerSampleLosses(NamedTuple):
    """The losses of a batch and how they make up the criterion's value.

    The ordinary gradient is ``scale * Σ_i (n_i / Σ n) ∇ℓ_i`` with n = ``counts``, or all alike.

    Attributes:
        losses: ℓ, shape (B,), differentiable: the mean of each sample's n_i valid elements, class
            weights included; 0 with gradient 0 where there are none.
        value: What the criterion itself returns, detached.
        scale: Detached. 1 for the plain mean, Σn / Σc for torch's mean with class weights c,
            Σn for the sum, the number of elements of a sample for KLDivLoss' ``batchmean``.
        labels: Class of each sample or ``ignore_index``, int64 of shape (B,), if the target is one.
        counts: n, integers or bool of shape (B,), or None if all are known to be equal. Samples
            with 0 are part of no mean.
        elements: Σn, or None if every sample is one. A mean over several batches divides by the sum
            of ``elements / scale``.
        summed: Whether the value is the sum.
    """

    losses: Tensor
    value: Tensor
    scale: Tensor | float
    labels: Tensor | None = None
    counts: Tensor | None = None
    elements: Tensor | float | None = None
    summed: bool = False

    def ordinary_factors(self) -> Tensor:
        """The factors of ∇ℓ_i in the ordinary gradient: (B,), detached."""
        losses = self.losses.detach()
        if self.counts is None:
            return torch.full_like(losses, 1 / max(1, len(losses))) * self.scale
        counts = self.counts.to(losses.dtype)
        return counts / counts.sum().clamp(min=1) * self.scale


def unreduced(
    criterion: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """What the criterion returns with ``reduction="none"``."""
    attributes = vars(criterion)  # nn.Module's __setattr__ takes as long as a small loss
    own = attributes.get("reduction")
    handed_on = None  # by a property, to the criteria inside
    if own is None and isinstance(getattr(type(criterion), "reduction", None), property):
        handed_on = criterion.reduction
        criterion.reduction = "none"
    else:
        attributes["reduction"] = "none"
    try:
        # Not criterion(...), whose hooks may have called this.
        elements: Tensor = (forward or forward_of(criterion))(*args, **kwargs)
    finally:
        if handed_on is not None:
            criterion.reduction = handed_on
        elif own is None:
            del attributes["reduction"]  # it was the class's
        else:
            attributes["reduction"] = own
    return elements


def forward_of(criterion: nn.Module) -> Callable[..., Any]:
    """Its own, which a stand-in names ``original``."""
    return getattr(criterion.forward, "original", criterion.forward)


def fold(
    elements: Tensor,
    batch: int,
    reduction: str,
    *,
    valid: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    labels: Tensor | None = None,
    mean: tuple[Tensor, Tensor] | None = None,
) -> PerSampleLosses:
    """Means over each sample's valid elements (others are 0), and the value of torch's reduction.

    A mean divides by the normaliser, or the number of valid ones, which the plain ``mean`` may come
    with. Nothing waits for a device.
    """
    detached = elements.detach()
    counts: Tensor | None = None
    total: Tensor | int = elements.numel()
    if valid is None and total == batch:
        # A view costs time and a node in the graph.
        losses = elements if elements.dim() == 1 else elements.reshape(-1)
    elif valid is None:
        rows = elements.reshape(batch, -1)
        losses = rows.mean(1) if total else rows.sum(1)  # the mean of nothing would be NaN
    else:
        losses, counts = _valid_row_means(elements, valid, batch)
        total = torch.count_nonzero(valid) if mean is None else mean[1]

    scale: Tensor | float = 1.0
    if reduction == "sum":
        value = detached.sum()
        wide = torch.float32 if elements.dtype in _HALVES else elements.dtype
        scale = float(total) if isinstance(total, int) else total.to(wide)
    elif normaliser is not None:
        value = _quotient(detached, normaliser)
        if isinstance(normaliser, Tensor) or normaliser:  # Python's 0/0 raises
            scale = total / normaliser
        if isinstance(scale, Tensor):
            # 0/0, all ignored: torch's gradient is 0, as any number leaves it.
            scale = scale.nan_to_num(1.0, posinf=float("inf"))
    elif mean is not None:
        value = mean[0]
    else:
        value = detached.mean() if valid is None else _quotient(detached, total)
    return PerSampleLosses(losses, value, scale, labels, counts, total, reduction == "sum")


def _valid_row_means(elements: Tensor, valid: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    if elements.numel() == batch:
        return elements.reshape(-1), valid.reshape(-1)
    counts = valid.reshape(batch, -1).sum(1)
    return _quotient(elements.reshape(batch, -1), counts.clamp(min=1), 1), counts


def _quotient(elements: Tensor, divisor: Tensor | float, *dim: int) -> Tensor:
    if elements.dtype not in _HALVES:
        return elements.sum(dim or None) / divisor
    # Their sum can overflow, or drop small terms.
    return (elements.sum(dim or None, dtype=torch.float32) / divisor).to(elements.dtype)


Compute: TypeAlias = Callable[..., PerSampleLosses]


class Rule(NamedTuple):
    compute: Compute
    reductions: tuple[str, ...] = ("mean", "sum")
    trusted: bool = True  # to have a row or more a sample


def find_rule(criterion: nn.Module) -> Rule | None:
    """That of the class whose `forward` it has."""
    kind = type(criterion)
    if "forward" in vars(criterion):  # put there by somebody; whose, if not the class's?
        own = forward_of(criterion)
        if getattr(own, "__func__", None) is not getattr(kind, "forward", None):
            return None
    if (rule := RULES.get(kind)) is not None:
        return rule
    # A subclass with a forward of its own (a focal loss) is another loss.
    for base in kind.__mro__:
        if base in RULES and kind.forward is base.forward:
            return RULES[base]
    return None


def plain(criterion: Any, elements: Tensor, batch: int, *_: Any, **__: Any) -> PerSampleLosses:
    return fold(elements, batch, criterion.reduction)


def labelled(threshold: float | None = None) -> Compute:
    """With labels from the target, by a threshold or as they are."""

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
    valid = target.long() != ignore_index  # which uint8, whose 156 is its -100, would wrap
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
        mean=None if everything else _mean_and_number(elements, ignore_index),
    )


def _mean_and_number(elements: Tensor, ignore_index: int) -> tuple[Tensor, Tensor] | None:
    """By torch's kernel, if the log-probabilities are at hand."""
    node: Any = elements.grad_fn
    # Halves are too narrow for the number.
    known = type(node).__name__ == "NllLossBackward0" and elements.dtype not in _HALVES
    if not known or not is_plain_autograd():
        return None
    read = node._saved_self.detach(), node._saved_target, None, 1, ignore_index
    return torch.ops.aten.nll_loss_forward(*read)  # type: ignore[no-any-return]


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
    # Elements are sums over a target's symbols; torch's mean divides each by its length, >= 1.
    if batch != elements.shape[0]:
        raise ValueError(
            f"batch_size={batch} must be {elements.shape[0]}: CTCLoss has one loss per sequence"
        )
    lengths = torch.as_tensor(target_lengths, device=elements.device).reshape(-1).clamp(min=1)
    means = fold(elements / lengths, batch, "mean")
    if criterion.reduction == "mean":
        return means
    total = lengths.sum()
    value, scale = elements.detach().sum(), total.to(elements.dtype)
    return means._replace(value=value, scale=scale, counts=lengths, elements=total, summed=True)


def _labels(target: Tensor, batch: int, threshold: float | None = None) -> Tensor | None:
    if target.numel() != batch:
        return None
    labels = target if threshold is None else target > threshold
    return (labels if labels.dim() == 1 else labels.reshape(-1)).long()


_PLAIN = [
    *(nn.CosineEmbeddingLoss, nn.GaussianNLLLoss, nn.HingeEmbeddingLoss, nn.HuberLoss, nn.L1Loss),
    *(nn.MarginRankingLoss, nn.MSELoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss),
    *(nn.PoissonNLLLoss, nn.SmoothL1Loss, nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss),
]
RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_PLAIN, Rule(plain)),
    **dict.fromkeys([nn.BCELoss, nn.BCEWithLogitsLoss], Rule(labelled(0.5))),
    **dict.fromkeys([nn.CrossEntropyLoss, nn.NLLLoss], Rule(_cross_entropy)),
    nn.CTCLoss: Rule(_ctc),
    nn.KLDivLoss: Rule(_kl_div, ("mean", "sum", "batchmean")),
    # Its mean divides by the number of samples, class weights or not.
    nn.MultiMarginLoss: Rule(labelled()),
    nn.SoftMarginLoss: Rule(labelled(0.0)),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the lowest torch supported
    RULES[nn.LinearCrossEntropyLoss] = Rule(_cross_entropy)
