"""Methods that look at the classes one by one, or that have an early model point out samples.

JTT                 draws what the early model gets wrong ``times`` as often
IRW in classes      S is the worst-off share of each class, by the loss now or by an early model's
IRW class by class  weights by an early class-balanced model, in each class by itself, of sum 1, and
                    held; the second model is trained plainly on batches drawn by them

In a class by itself, since between classes the sign of <g_i, g_S> is little but the label. Held,
since weights that follow the model chase it: who was worst off is over-served, then forgotten.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.data.memory import drawn
from benchmarks.data.sources import Samples
from benchmarks.methods import objectives
from benchmarks.methods.intrinsic import Intrinsic
from benchmarks.models import outputs_of
from benchmarks.training import Method, Recipe, Trainer, cross_entropy, train
from irw_optim import worst_off
from irw_optim.gradients.protocol import PerSampleGradients, align
from irw_optim.schemes import ClassByClassSampler

Weighing = Mapping[str, Any]
"""Options of the library's sampler, whose weights are used."""
BY_LOSS: Weighing = {"by": "losses"}
"""The control: the loss, for which no gradient is needed."""


def intrinsic(alpha: float) -> Weighing:
    """The worst-off alpha-fraction of each class, and who of the class helps them."""
    return {"by": "gradients", "alpha": alpha}


def early_model(
    data: Samples, method: Method, recipe: Recipe, seed: int, share: float
) -> nn.Module:
    """A model after a share of the steps."""
    early = replace(recipe, steps=max(1, round(share * recipe.steps)))
    with torch.random.fork_rng(devices=[]):  # the second model's initialisation is drawn already
        return train(data, method, early, seed)


def on_draws(model: nn.Module, weights: Tensor, recipe: Recipe, seed: int) -> Trainer:
    """Plain training on batches drawn in proportion to the weights."""
    batches = drawn(weights, recipe.batch, seed)
    trainer = objectives.by_loss(objectives.mean, model, recipe, batches)
    return trainer._replace(held=weights)


@dataclass(frozen=True)
class JTT:
    """Just train twice (Liu et al. 2021); the paper does not draw every class equally often."""

    early: float
    times: float
    class_balance: bool = False

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        first = early_model(data, objectives.plain(), recipe, seed, self.early)
        weights = torch.where(outputs_of(first, data.x).argmax(1) != data.y, self.times, 1.0)
        if self.class_balance:
            weights = weights / of_class(weights, data.y).clamp(min=1e-30)
        return on_draws(model, weights, recipe, seed)


@dataclass(frozen=True)
class ClassByClass:
    """Draws by `class_by_class` weights of an early model, times `trust` where that is asked."""

    weighing: Weighing
    early: float
    mix: float
    trusted: bool = False

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        first = early_model(data, objectives.class_balanced(), recipe, seed, self.early)
        trusted = trust(data, recipe, seed) if self.trusted else torch.ones(len(data))
        weights = class_by_class(self.weighing, first, data, self.mix, trusted)
        return on_draws(model, weights, recipe, seed)


def class_by_class(
    weighing: Weighing,
    model: nn.Module,
    data: Samples,
    mix: float = 0.0,
    trusted: Tensor | float = 1.0,
) -> Tensor:
    """Weights of all samples, (N,): those of each class by itself, of sum 1 each.

    They are even where all of a class would be 0; ``mix`` is the share that is spread evenly.
    """
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=4096)
    given = {"generator": torch.Generator(), "progress": False, "mix": 0.0, **weighing}
    with warnings.catch_warnings():  # of few effective samples, which `evaluation` counts
        warnings.simplefilter("ignore")
        sampler = ClassByClassSampler(model, nn.CrossEntropyLoss(), loader, **given)
    weights = (sampler.weights * trusted).clamp(min=1e-30)
    even = 1 / of_class(torch.ones(len(data)), data.y)
    return (1 - mix) * weights / of_class(weights, data.y) + mix * even


def trust(data: Samples, recipe: Recipe, seed: int) -> Tensor:
    """How probable each sample's label is to a model that was trained on the other half, (N,)."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    halves, probable = order.tensor_split(2), torch.empty(len(data))
    for own, other in (halves, halves[::-1]):
        model = early_model(data[other], objectives.class_balanced(), recipe, seed, share=1.0)
        logits, y = outputs_of(model, data.x[own]), data.y[own]
        probable[own] = logits.softmax(1).gather(1, y[:, None]).squeeze(1)
    return probable


@dataclass(frozen=True)
class InClasses:
    """IRW with S in each class, class_balance, and a floor under the weights.

    S is the worst ``alpha`` of each batch as it comes; given a share ``early`` of the steps, it is
    what a class-balanced model was worst at after them, and is held. A sample without a positive
    score weighs ``floor`` mean weights of its class.
    """

    alpha: float
    early: float = 0.0
    center: float = 0.0
    floor: float = 1.0

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        if self.early:
            first = early_model(data, objectives.class_balanced(), recipe, seed, self.early)
            losses = cross_entropy(outputs_of(first, data.x), data.y)
            members = worst_in_each_class(losses, data.y, self.alpha)
        batch = torch.arange(0)  # who the losses of the next pass are of

        def rule(losses: Tensor, gradients: PerSampleGradients, worst: Tensor) -> Tensor:
            """floor + max(0, s_i) / mean of it in the class, s = G G^T (1_S - center |S| / B)."""
            labels = data.y[batch]
            S = members[batch] if self.early else worst_in_each_class(losses, labels, self.alpha)
            inside = S.to(losses.dtype)
            aligned = align(gradients, inside - self.center * inside.mean()).clamp(min=0)
            average = of_class(aligned, labels) / of_class(torch.ones_like(aligned), labels)
            return aligned / average.clamp(min=1e-30) + self.floor

        options = {"weighting": rule, "class_balance": True}
        trainer = Intrinsic(self.alpha, 0.0, options).prepare(model, data, recipe, seed)

        def backward(losses: Tensor, index: Tensor) -> None:
            nonlocal batch
            batch = index
            trainer.backward(losses, index)

        return trainer._replace(backward=backward)


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


def moved(logits: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Logits minus ``strength`` times the log shares of the classes (Menon et al. 2021).

    At 1 it decides as if the classes were equally frequent: with two of them the threshold moves
    from 1/2 to the share of the second.
    """
    frequency = labels.bincount() / len(labels)
    return logits - strength * frequency.log()
