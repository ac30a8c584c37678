"""Methods that look at the classes one by one, or that have an early model point out samples.

JTT               draws what the early model gets wrong ``times`` as often
IRW in classes    S is the worst-off share of each class, by the loss now or by an early model's
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fairness.data import Samples
from benchmarks.fairness.loop import Method, Recipe, Trainer, drawn, scores, train
from benchmarks.fairness.methods.intrinsic import Intrinsic
from benchmarks.fairness.methods.objectives import class_balanced, mean, plain
from irw_optim import worst_off
from irw_optim.gradients.protocol import PerSampleGradients, align


@dataclass(frozen=True)
class JTT:
    """Just train twice (Liu et al. 2021).

    Attributes:
        early: the first training's share of the steps.
        times: how often its errors are drawn.
        class_balance: draw every class equally often; the paper does not.
    """

    early: float
    times: float
    class_balance: bool = False

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        wrong = early_logits(data, plain(), recipe, seed, self.early).argmax(1) != data.y
        weights = torch.where(wrong, self.times, 1.0)
        if self.class_balance:
            weights = weights / of_class(weights, data.y).clamp(min=1e-30)
        return Trainer(
            recipe.optimizer(model),
            lambda losses, index: mean(losses, index).backward(),
            drawn(weights, recipe.batch, seed),
        )


@dataclass(frozen=True)
class InClasses:
    """IRW with S in each class, class_balance, and a floor under the weights.

    Attributes:
        alpha: share of each class that makes S.
        early: S is what a class-balanced model was worst at after that share of the steps, and is
            held; 0 for the worst of each batch as it comes.
        center: as of `IRWOptimizer`.
        floor: what a sample without a positive score weighs, in mean weights of its class.
    """

    alpha: float
    early: float = 0.0
    center: float = 0.0
    floor: float = 1.0

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        members = None
        if self.early:
            logits = early_logits(data, class_balanced(), recipe, seed, self.early)
            losses = F.cross_entropy(logits, data.y, reduction="none")
            members = worst_in_each_class(losses, data.y, self.alpha)
        rule = InClassesRule(self, data.y, members)
        options = {"weighting": rule, "class_balance": True}
        trainer = Intrinsic(self.alpha, 0.0, options).prepare(model, data, recipe, seed)

        def backward(losses: Tensor, index: Tensor) -> None:
            rule.batch = index
            trainer.backward(losses, index)

        return trainer._replace(backward=backward)


class InClassesRule:
    """Scores floor + max(0, s_i) / mean of it in the class, s = G G^T c, c = 1_S - center |S| / B.

    Attributes:
        batch: who the next losses are of, (B,); set before each backward pass.
    """

    needs_gradients = True

    def __init__(self, options: InClasses, labels: Tensor, members: Tensor | None) -> None:
        self.options, self.labels, self.members = options, labels, members
        self.batch = torch.arange(0)

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst: Tensor) -> Tensor:
        labels = self.labels[self.batch]
        inside = (
            worst_in_each_class(losses, labels, self.options.alpha)
            if self.members is None
            else self.members[self.batch]
        ).to(losses.dtype)
        aligned = align(gradients, inside - self.options.center * inside.mean()).clamp(min=0)
        sizes = of_class(torch.ones_like(aligned), labels)
        average = of_class(aligned, labels) / sizes
        return aligned / average.clamp(min=1e-30) + self.options.floor


def of_class(values: Tensor, labels: Tensor) -> Tensor:
    """For each sample the sum of the values over its class, (N,)."""
    return values.new_zeros(int(labels.max()) + 1).index_add(0, labels, values)[labels]


def worst_in_each_class(losses: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """The worst alpha-fraction of each class, (N,) bool."""
    worst = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        own = labels == label
        worst[own] = worst_off(losses[own], alpha)
    return worst


def early_logits(data: Samples, method: Method, recipe: Recipe, seed: int, share: float) -> Tensor:
    """What a model says of the training samples after a share of the steps."""
    generator_state = torch.get_rng_state()  # the second model's initialisation is drawn already
    early = replace(recipe, steps=max(1, round(share * recipe.steps)))
    logits = scores(train(data, method, early, seed), data.x)
    torch.set_rng_state(generator_state)
    return logits


def moved(logits: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Logits minus ``strength`` times the log shares of the classes (Menon et al. 2021).

    At 1 it decides as if the classes were equally frequent: with two of them the threshold moves
    from 1/2 to the share of the second.
    """
    frequency = labels.bincount() / len(labels)
    return logits - strength * frequency.log()
