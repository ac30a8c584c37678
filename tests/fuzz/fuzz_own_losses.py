"""Losses as users write them, with an attribute ``reduction``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Own(nn.Module):
    """A loss as users write them, with an attribute ``reduction``."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def reduced(self, elements: Tensor) -> Tensor:
        if self.reduction == "none":
            return elements
        return elements.mean() if self.reduction == "mean" else elements.sum()


class Charbonnier(Own):
    def forward(self, out, target):
        return self.reduced(((out - target).square() + 0.1).sqrt())


class Focal(Own):
    def forward(self, input, target, gamma=2.0):
        losses = F.cross_entropy(input, target, reduction="none")
        return self.reduced((1 - (-losses).exp()) ** gamma * losses)


class FocalOnTop(nn.CrossEntropyLoss):
    """A subclass with a forward of its own."""

    def forward(self, input, target):
        losses = F.cross_entropy(input, target, reduction="none")
        losses = (1 - (-losses).exp()) ** 2 * losses
        return losses if self.reduction == "none" else losses.mean()


class Masked(Own):
    """The mean over what the mask leaves, which is no mean of the elements."""

    def forward(self, out, target, mask):
        elements = (out - target).square() * mask
        return elements if self.reduction == "none" else elements.sum() / mask.sum()


class Dice(Own):
    """Of every sample, or of the whole batch for every class."""

    def __init__(self, batch: bool) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, out, target):
        shares, hits = out.softmax(1), F.one_hot(target, out.shape[1])
        dims = 0 if self.batch else 1
        overlap = (shares * hits).sum(dims)
        return self.reduced(1 - 2 * overlap / (shares + hits).sum(dims))


class Penalised(Own):
    """A term on top that no sample has."""

    def forward(self, out, target):
        elements = (out - target).abs()
        return elements if self.reduction == "none" else elements.mean() + 0.1
