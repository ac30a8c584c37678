"""An entry of the zoo: a model, a batch for it, and one loss a sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[tuple[Tensor, ...], Tensor]
"""What the model is called with, and the target."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: unique.
        family: the field it comes from.
        size: B, the samples in a batch.
        model: makes it, in training mode; called as ``model(*inputs)``.
        batch: ``batch(B)`` draws inputs and target.
        losses: ``losses(output, target)`` of shape (B,); None attaches `nn.CrossEntropyLoss`.
    """

    name: str
    family: str
    size: int
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    losses: Callable[[Tensor, Tensor], Tensor] | None = None

    def make(self, seed: int = 0) -> nn.Module:
        """The model, with the same parameters for the same seed."""
        torch.manual_seed(seed)
        return self.model().train()

    def draw(self, size: int | None = None, seed: int = 1) -> Batch:
        """A batch, the same for the same seed."""
        torch.manual_seed(seed)
        return self.batch(size or self.size)


# Batches ---------------------------------------------------------------------------------------

WORDS = 500
"""The tokens of all texts."""


def images(side: int) -> Callable[[int], Batch]:
    """Square pictures in colour, of ten classes."""
    return lambda size: ((torch.randn(size, 3, side, side),), torch.randint(10, (size,)))


def rows(features: int) -> Callable[[int], Batch]:
    """Numbers of a table, of two classes."""
    return lambda size: ((torch.randn(size, features),), torch.randint(2, (size,)))


def waves(length: int, channels: int = 1) -> Callable[[int], Batch]:
    """Series (B, channels, length), of ten classes."""
    return lambda size: ((torch.randn(size, channels, length),), torch.randint(10, (size,)))


def sentences(length: int) -> Callable[[int], Batch]:
    """Tokens (B, length), of two classes; no token is 0 or 1, which models pad with."""
    return lambda size: ((torch.randint(2, WORDS, (size, length)),), torch.randint(2, (size,)))


def texts(length: int) -> Callable[[int], Batch]:
    """Tokens (B, length), and for each the next one."""

    def draw(size: int) -> Batch:
        tokens = torch.randint(2, WORDS, (size, length + 1))
        return (tokens[:, :-1].contiguous(),), tokens[:, 1:].contiguous()

    return draw


def pairs(source: int, target: int) -> Callable[[int], Batch]:
    """Texts of two lengths, and for each token of the second the next one."""

    def draw(size: int) -> Batch:
        (first,), _ = texts(source)(size)
        (second,), following = texts(target)(size)
        return (first, second), following

    return draw


# Losses ----------------------------------------------------------------------------------------


def per_sequence(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of each sequence, (B, T, V) and (B, T) to (B,)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def per_picture(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels of each picture, (B, C, H, W) and (B, H, W) to (B,)."""
    return F.cross_entropy(logits, targets, reduction="none").mean((1, 2))


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B, ...) to (B,)."""
    return (output - target).square().flatten(1).mean(1)
