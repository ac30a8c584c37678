"""The one training loop, and the model. What differs between the methods is a `Trainer`.

trainer = method.prepare(model, data, recipe, seed)
for index in trainer.batches:
    losses = cross_entropy(model(x[index]), y[index])       # per sample
    trainer.backward(losses, index)                         # the method
    trainer.optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.fairness.data import Samples


@dataclass(frozen=True)
class Recipe:
    """What all methods share; the learning rate of Adam falls to 0 along a cosine."""

    steps: int = 100
    batch: int = 512
    lr: float = 1e-2
    widths: tuple[int, ...] = (64, 32)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.lr)


SLOW = Recipe(steps=500, batch=128, lr=1e-3)
"""Five times the steps of a tenth of the length, on a quarter of the samples each."""


class Trainer(NamedTuple):
    """A method at work on one model.

    Attributes:
        optimizer: takes the step.
        backward: is given the losses of a batch, (B,), and who they are of, (B,).
        batches: without end; the indices of each batch.
    """

    optimizer: torch.optim.Optimizer
    backward: Callable[[Tensor, Tensor], object]
    batches: Iterator[Tensor]


class Method(Protocol):
    """One way to train."""

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        """Get ready to train the model on the data."""


def train(data: Samples, method: Method, recipe: Recipe, seed: int) -> nn.Module:
    """A model trained by the method; methods share a seed's initialisation."""
    torch.manual_seed(seed)
    model = mlp(data.x.shape[1], recipe.widths, data.classes)
    trainer = method.prepare(model, data, recipe, seed)
    decay = CosineAnnealingLR(trainer.optimizer, recipe.steps)
    for index in islice(trainer.batches, recipe.steps):
        trainer.optimizer.zero_grad()
        losses = F.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
        trainer.backward(losses, index)
        trainer.optimizer.step()
        decay.step()
    return model


def mlp(inputs: int, widths: tuple[int, ...], classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


@torch.no_grad()
def scores(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, (N, classes)."""
    return model(x)


def shuffled(size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Epoch after epoch in random order; an incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, size)
    while True:
        order = torch.randperm(size, generator=generator)
        yield from order[: size - size % batch].split(batch)


def drawn(weights: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Independent draws in proportion to ``weights``, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.multinomial(weights, batch, replacement=True, generator=generator)
