"""The one training loop. What differs between the methods is a `Trainer`.

trainer = method.prepare(model, data, recipe, seed)
for index in trainer.batches:
    losses = cross_entropy(model(x[index]), y[index])       # per sample
    trainer.backward(losses, index)                         # the method
    trainer.optimizer.step()
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.data.sources import Samples
from benchmarks.models import mlp

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What all methods share; the learning rate of Adam falls to 0 along a cosine."""

    steps: int = 100
    batch: int = 512
    lr: float = 1e-2
    widths: tuple[int, ...] = (64, 32)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.lr)

    def model(self, data: Samples) -> nn.Sequential:
        return mlp(data.x.shape[1], *self.widths, data.classes)


SLOW = Recipe(steps=500, batch=128, lr=1e-3)
"""Five times the steps of a tenth of the length, on a quarter of the samples each."""


class Trainer(NamedTuple):
    """A method at work on one model.

    Attributes:
        optimizer: takes the step.
        backward: is given the losses of a batch, (B,), and who they are of, (B,).
        batches: without end; the indices of each batch.
        held: the weights that the batches are drawn by, (N,), where they stay the same.
    """

    optimizer: torch.optim.Optimizer
    backward: Callable[[Tensor, Tensor], object]
    batches: Iterator[Tensor]
    held: Tensor | None = None


class Method(Protocol):
    """One way to train."""

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer: ...


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """A loss a sample, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def step(
    model: nn.Module, criterion: Loss, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """An ordinary step."""
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def take_steps(
    trainer: Trainer, model: nn.Module, data: Samples, number: int, loss: Loss = cross_entropy
) -> Iterator[Tensor]:
    """Train; gives the indices of each batch once its step is taken."""
    for index in islice(trainer.batches, number):
        trainer.optimizer.zero_grad()
        losses = loss(model(data.x[index]), data.y[index])
        trainer.backward(losses, index)
        trainer.optimizer.step()
        yield index


def train(
    data: Samples,
    method: Method,
    recipe: Recipe,
    seed: int,
    ready: Callable[[Trainer], object] = lambda trainer: None,
) -> nn.Module:
    """A model trained by the method; methods share a seed's initialisation.

    ``ready`` is shown the trainer before its first step.
    """
    torch.manual_seed(seed)
    model = recipe.model(data)
    trainer = method.prepare(model, data, recipe, seed)
    ready(trainer)
    decay = CosineAnnealingLR(trainer.optimizer, recipe.steps)
    for _ in take_steps(trainer, model, data, recipe.steps):
        decay.step()
    return model
