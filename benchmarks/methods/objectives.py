"""Methods that only change what is averaged: an objective of the per-sample losses of a batch.

    plain             mean_i l_i
    class-balanced    mean_i l_i / (C p_{y_i})
    chi-square DRO    min_eta  c sqrt(mean_i max(0, l_i - eta)^2) + eta
    ARL               mean_i lambda_i l_i,  lambda_i = 1 + B f(x_i, y_i) / sum_j f(x_j, y_j)
    GroupDRO          sum_g q_g mean_{i in g} l_i,  q_g <- q_g exp(step * mean_{i in g} l_i)

The last one is told the groups, and so is group balancing, a way to draw the batches: the oracles.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data.memory import drawn, shuffled
from benchmarks.data.sources import Samples
from benchmarks.training import Recipe, Trainer

Objective = Callable[[Tensor, Tensor], Tensor]
"""From the losses of a batch, (B,), and the samples' indices, (B,), to a number."""


@dataclass(frozen=True)
class ByObjective:
    """Trains on an objective made for the data, on batches drawn by weights, (N,), or shuffled."""

    objective: Callable[[Samples, Recipe], Objective]
    sampling: Callable[[Samples], Tensor] | None = None

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        if self.sampling is None:
            batches = shuffled(len(data), recipe.batch, seed)
        else:
            batches = drawn(self.sampling(data), recipe.batch, seed)
        return by_loss(self.objective(data, recipe), model, recipe, batches)


def by_loss(
    objective: Objective, model: nn.Module, recipe: Recipe, batches: Iterator[Tensor]
) -> Trainer:
    """Plain autograd of the objective."""

    def backward(losses: Tensor, index: Tensor) -> None:
        objective(losses, index).backward()

    return Trainer(recipe.optimizer(model), backward, batches)


def mean(losses: Tensor, index: Tensor) -> Tensor:
    """Plain training."""
    return losses.mean()


def plain() -> ByObjective:
    return ByObjective(lambda data, recipe: mean)


def class_balanced() -> ByObjective:
    """Each class has the same total weight."""

    def make(data: Samples, recipe: Recipe) -> Objective:
        weight = data.y.bincount().float().reciprocal()
        weight = weight / weight[data.y].mean()
        return lambda losses, index: (weight[data.y[index]] * losses).mean()

    return ByObjective(make)


def chi_square(alpha: float, warm_up: float = 0.0) -> ByObjective:
    """Distributionally robust optimisation over a chi-square ball (Hashimoto et al. 2018)."""

    def make(data: Samples, recipe: Recipe) -> Objective:
        steps, plainly = count(), round(warm_up * recipe.steps)

        def objective(losses: Tensor, index: Tensor) -> Tensor:
            return losses.mean() if next(steps) < plainly else chi_square_risk(losses, alpha)

        return objective

    return ByObjective(make)


def chi_square_risk(losses: Tensor, alpha: float) -> Tensor:
    """max_q sum_i q_i l_i over distributions with mean_i (B q_i - 1)^2 / 2 <= (1/alpha - 1)^2.

    By its dual, min_eta c sqrt(mean_i max(0, l_i - eta)^2) + eta with c^2 = 1 + 2 (1/alpha - 1)^2,
    which is convex in eta: the root of its derivative, and the gradient at the minimum.
    """
    if alpha == 1:
        return losses.mean()
    c = math.sqrt(1 + 2 * (1 / alpha - 1) ** 2)

    def slope(eta: float) -> float:
        excess = (values - eta).clamp(min=0)
        return 1 - c * float(excess.mean()) / math.sqrt(float(excess.square().mean()))

    values = losses.detach().double()
    top = float(values.max())
    low = top - 1.0 - float(values.max() - values.min())
    while slope(low) > 0:  # tends to 1 - c < 0
        low = top - 2 * (top - low)
    high = top - 1e-9 * max(1.0, abs(top))
    if slope(high) < 0:  # the ball holds every distribution
        return losses.max()
    eta = brentq(slope, low, high, xtol=1e-14)
    excess = (losses - eta).clamp(min=0)
    return c * excess.square().mean().sqrt() + eta


def arl(lr: float = 1e-2) -> ByObjective:
    """Adversarially reweighted learning (Lahoti et al. 2020): a linear adversary on (x, y)."""

    def make(data: Samples, recipe: Recipe) -> Objective:
        inputs = torch.cat([data.x, F.one_hot(data.y, data.classes).to(data.x.dtype)], dim=1)
        adversary = nn.Linear(inputs.shape[1], 1)
        ascent = torch.optim.Adam(adversary.parameters(), lr=lr, maximize=True)

        def objective(losses: Tensor, index: Tensor) -> Tensor:
            weights = adversarial_weights(adversary(inputs[index]).squeeze(1))
            ascent.zero_grad()
            (weights * losses.detach()).mean().backward()
            ascent.step()
            return (weights.detach() * losses).mean()

        return objective

    return ByObjective(make)


def adversarial_weights(logits: Tensor) -> Tensor:
    """lambda_i = 1 + B f_i / sum_j f_j with f = sigmoid(logits), (B,)."""
    f = logits.sigmoid()
    return 1 + len(f) * f / f.sum()


# Told the groups ------------------------------------------------------------------------------


def even_groups(grouping: str) -> Callable[[Samples], Tensor]:
    """Weights to draw by that give every group the same share of the draws."""

    def weights(data: Samples) -> Tensor:
        codes = data.groups[grouping]
        return 1 / codes.bincount()[codes].float()

    return weights


def group_balanced(grouping: str) -> ByObjective:
    return ByObjective(lambda data, recipe: mean, even_groups(grouping))


def group_dro(grouping: str, step: float = 0.01) -> ByObjective:
    """GroupDRO (Sagawa et al. 2020, algorithm 1), with the groups drawn evenly as there."""

    def make(data: Samples, recipe: Recipe) -> Objective:
        codes = data.groups[grouping]
        q = torch.ones(int(codes.max()) + 1)

        def objective(losses: Tensor, index: Tensor) -> Tensor:
            means = group_means(losses, codes[index], len(q))
            grown = q * (step * means.detach()).exp()
            q.copy_(grown / grown.sum())
            return (q * means).sum()

        return objective

    return ByObjective(make, even_groups(grouping))


def group_means(losses: Tensor, member: Tensor, groups: int) -> Tensor:
    """The mean loss of each group, 0 for one that is not in the batch."""
    zeros = losses.new_zeros(groups)
    sizes = zeros.index_add(0, member, torch.ones_like(losses))
    return zeros.index_add(0, member, losses) / sizes.clamp(min=1)
