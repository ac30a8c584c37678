"""Methods in two stages: an early model points out samples, a second training looks at them.

JTT         draws what the early model gets wrong ``times`` as often
Frozen S    IRW with S of the early model's worst-off, held for the whole training
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fairness.data import Samples
from benchmarks.fairness.loop import Method, Recipe, Trainer, drawn, scores, train
from benchmarks.fairness.methods.intrinsic import Intrinsic
from benchmarks.fairness.methods.objectives import mean, plain
from irw_optim import worst_off
from irw_optim.gradients.protocol import PerSampleGradients, align


@dataclass(frozen=True)
class JTT:
    """Just train twice (Liu et al. 2021).

    Attributes:
        early: the first training's share of the steps.
        times: how often its errors are drawn.
    """

    early: float
    times: float

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        logits = early_logits(data, plain(), recipe, seed, self.early)
        wrong = logits.argmax(1) != data.y
        return Trainer(
            recipe.optimizer(model),
            lambda losses, index: mean(losses, index).backward(),
            drawn(torch.where(wrong, self.times, 1.0), recipe.batch, seed),
        )


@dataclass(frozen=True)
class FrozenWorst:
    """IRW whose S is what an early model was worst at in each class, for the whole training."""

    local: Intrinsic
    early: float

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        logits = early_logits(data, plain(), recipe, seed, self.early)
        losses = F.cross_entropy(logits, data.y, reduction="none")
        members = worst_in_each_class(losses, data.y, self.local.alpha)
        rule = HeldMembers(members, self.local.options.get("center", 0.0))
        options = {k: v for k, v in self.local.options.items() if k != "center"}
        options["weighting"] = rule
        trainer = replace(self.local, options=options).prepare(model, data, recipe, seed)

        def backward(losses: Tensor, index: Tensor) -> None:
            rule.batch = index
            trainer.backward(losses, index)

        return trainer._replace(backward=backward)


class HeldMembers:
    """A score rule: s = G G^T c with c_i = 1_S(i) - center |S| / B for an S that is given.

    Attributes:
        members: (N,) bool.
        batch: who the next losses are of, (B,); set before each backward pass.
    """

    needs_gradients = True

    def __init__(self, members: Tensor, center: float) -> None:
        self.members, self.center = members, center
        self.batch = torch.arange(0)

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst: Tensor) -> Tensor:
        inside = self.members[self.batch].to(losses.dtype)
        return align(gradients, inside - self.center * inside.mean())


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
