"""Two stages: an early model says who is worst off in each class, a second one is trained on that.

    early  = a class-balanced model after a share of the steps
    w      = in each class by itself the global scheme's weights, of sum 1, and held
    model  = trained anew and plainly, on batches drawn in proportion to w

In a class by itself, since between classes the sign of <g_i, g_S> is little but the label. Held,
since weights that follow the model chase it: who was worst off is over-served, then forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fairness.data import Samples
from benchmarks.fairness.loop import Recipe, Trainer, drawn, scores, train
from benchmarks.fairness.methods.objectives import class_balanced, mean
from irw_optim.schemes import global_weights

Weighing = Callable[[nn.Module, Samples], Tensor]
"""From a model and n samples to weights, (n,), of sum 1."""


@dataclass(frozen=True)
class ClassByClass:
    """Draws by weights that an early model gives each class by itself.

    Attributes:
        weighing: makes the weights of one class.
        early: the first training's share of the steps.
    """

    weighing: Weighing
    early: float

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        weights = class_by_class(self.weighing, self.early_model(data, recipe, seed), data)
        return Trainer(
            recipe.optimizer(model),
            lambda losses, index: mean(losses, index).backward(),
            drawn(weights, recipe.batch, seed),
        )

    def early_model(self, data: Samples, recipe: Recipe, seed: int) -> nn.Module:
        state = torch.get_rng_state()  # the second model's initialisation is drawn already
        shorter = replace(recipe, steps=max(1, round(self.early * recipe.steps)))
        model = train(data, class_balanced(), shorter, seed)
        torch.set_rng_state(state)
        return model


def class_by_class(weighing: Weighing, model: nn.Module, data: Samples) -> Tensor:
    """Weights of all samples, (N,): those of each class by itself, of sum 1 each."""
    weights = torch.zeros(len(data))
    for label in data.y.unique():
        own = (data.y == label).nonzero().squeeze(1)
        weights[own] = weighing(model, data[own])
    return weights


def intrinsic(alpha: float, mix: float) -> Weighing:
    """The library's global scheme: the worst-off alpha-fraction, and who helps them."""

    def weights(model: nn.Module, data: Samples) -> Tensor:
        loader = DataLoader(TensorDataset(data.x, data.y), batch_size=4096)
        criterion = nn.CrossEntropyLoss()
        return global_weights(model, criterion, loader, alpha, mix=mix, progress=False)

    return weights


def by_loss(mix: float) -> Weighing:
    """The control: in proportion to the loss, for which no gradient is needed."""

    def weights(model: nn.Module, data: Samples) -> Tensor:
        losses = F.cross_entropy(scores(model, data.x), data.y, reduction="none")
        return (1 - mix) * losses / losses.sum() + mix / len(losses)

    return weights
