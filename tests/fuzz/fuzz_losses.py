"""Random criteria, and what their per-sample losses must be, from torch's own unreduced elements.

The mean over a sample's own valid elements is its loss; ``scale`` is the factor that makes
``scale * sum_i n_i / n * loss_i`` the criterion's value, with n_i the sample's valid elements.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from irw_optim import PerSampleLoss


class Task(NamedTuple):
    """A criterion, and the targets that go with it.

    Attributes:
        criterion: makes it.
        target: ``"class"``, ``"shares"``, ``"number"``, ``"bit"``, ``"sign"`` or ``"single bit"``.
        output: applied to the model's output before: ``"as it is"``, ``"log"`` or ``"first"``.
        ignored: of so many targets one is ignored; 0 for none.
    """

    criterion: Any
    target: str
    output: str = "as it is"
    ignored: int = 0

    def build(self, classes: int, dtype: torch.dtype) -> nn.Module:
        options = dict(self.criterion.keywords)
        if options.pop("weight", False):
            options["weight"] = torch.linspace(0.5, 2, classes)
        return partial(self.criterion.func, *self.criterion.args, **options)().to(dtype)

    def prepared(self, output: Tensor) -> Tensor:
        if self.output == "log":
            return output.log_softmax(1)
        return output[:, 0] if self.output == "first" else output

    def targets(self, output: Tensor, criterion: nn.Module) -> Tensor:
        """Targets for an output of this shape, from torch's generator."""
        if self.target == "class":
            target = torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))
            if self.ignored:
                ignored = torch.randint(self.ignored, target.shape) == 0
                target[ignored] = criterion.ignore_index
            return target
        if self.target == "shares":
            return torch.randn_like(output).softmax(1)
        if self.target == "bit":
            return torch.randint(2, output.shape).to(output.dtype)
        if self.target == "sign":
            return torch.randint(2, output.shape).to(output.dtype) * 2 - 1
        return torch.randn_like(output)

    @property
    def has_labels(self) -> bool:
        return self.target == "class" or (self.output == "first" and self.target != "number")


class Losses(NamedTuple):
    """Of one batch: losses (B,) with their graph, and what makes the criterion's value of them."""

    losses: Tensor
    value: Tensor
    scale: float
    counts: Tensor
    labels: Tensor | None


def expected(criterion: nn.Module, output: Tensor, target: Tensor) -> Losses:
    """The definitions, written out."""
    size = len(output)
    unreduced = copy.deepcopy(criterion)
    unreduced.reduction = "none"
    elements = unreduced(output, target)
    of_classes = isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and not (
        target.is_floating_point()
    )
    valid = torch.ones_like(elements, dtype=torch.bool)
    if of_classes:
        valid = target != criterion.ignore_index
    counts = valid.reshape(size, -1).sum(1) if elements.numel() else torch.zeros(size).long()
    sums = elements.flatten(1).sum(1) if elements.ndim > 1 else elements
    losses = sums / counts.clamp(min=1)

    scale = 1.0
    if criterion.reduction == "sum":
        scale = float(counts.sum())
    elif criterion.reduction == "batchmean":
        scale = float(elements[0].numel() if size else 1)  # a sample's own elements
    elif of_classes and criterion.weight is not None and bool(valid.any()):
        scale = float(valid.sum()) / float(criterion.weight[target[valid]].sum())
    labels = None
    if target.numel() == size and not isinstance(criterion, nn.MSELoss | PerSampleLoss):
        labels = target.reshape(-1) if of_classes else (target.reshape(-1) > 0.5)
        labels = labels.long()
    return Losses(losses, criterion(output, target).detach(), scale, counts, labels)


def cubes(output: Tensor, target: Tensor) -> Tensor:
    """Somebody's own loss."""
    return (output - target).abs() ** 1.5


@st.composite
def tasks(draw) -> Task:
    reduction = {"reduction": draw(st.sampled_from(["mean", "mean", "sum"]))}
    kind = draw(st.integers(0, 12))
    if kind < 5:
        options = {
            "weight": draw(st.booleans()),
            "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1])),
            "ignore_index": draw(st.sampled_from([-100, 1])),
        }
        ignored = draw(st.sampled_from([0, 0, 3, 2]))
        return Task(partial(nn.CrossEntropyLoss, **options, **reduction), "class", ignored=ignored)
    if kind == 5:
        ignored = draw(st.sampled_from([0, 3]))
        options = {"weight": draw(st.booleans())}
        return Task(partial(nn.NLLLoss, **options, **reduction), "class", "log", ignored)
    if kind == 6:
        return Task(partial(nn.CrossEntropyLoss, **reduction), "shares")
    if kind == 7:
        reduction = {"reduction": draw(st.sampled_from(["batchmean", "sum"]))}
        return Task(partial(nn.KLDivLoss, **reduction), "shares", "log")
    if kind == 8:
        return Task(partial(nn.BCEWithLogitsLoss, **reduction), "bit")
    if kind == 9:
        return Task(partial(nn.BCEWithLogitsLoss, **reduction), "bit", "first")
    if kind == 10:
        return Task(partial(nn.SoftMarginLoss, **reduction), "sign")
    if kind == 11:
        loss = draw(st.sampled_from([nn.SmoothL1Loss, nn.HuberLoss, nn.L1Loss]))
        return Task(
            partial(loss, **reduction), "number", draw(st.sampled_from(["as it is", "first"]))
        )
    loss = draw(st.sampled_from([nn.MSELoss, partial(PerSampleLoss, cubes)]))
    return Task(partial(loss, **reduction), "number")
