"""Variance of the update, resampling against reweighting, at the same weights and model state.

The paper's corollary says that resampling has the lower variance under SGD, and leaves other
optimizers open. Here: an MLP on UCI Adult after some training, its global IRW weights, and several
hundred independent draws of one update and of ten updates in a row, from the same state of model
and optimizer (warmed up on 50 plain steps). Three ways to use the weights w:

    resampling    batches drawn with replacement in proportion to w, plain average
    reweighting   batches drawn evenly with replacement, (N / B) sum_i w_i g_i: unbiased, the
                  corollary's counterpart
    normalised    batches drawn evenly without replacement, weights renormalised in the batch:
                  what GlobalScheme(use="reweighting") does; a ratio, so slightly biased

The variance is the trace of the covariance of the displacement of all parameters over the draws,
divided by the squared norm of resampling's mean displacement; ± is its standard error. For one SGD
step the first two are also computed in closed form, from all N per-sample gradients.
"""

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks import report
from benchmarks.data.memory import adult, batches, loader
from benchmarks.data.sources import Samples
from benchmarks.models import mlp, per_sample_gradients
from benchmarks.training import cross_entropy, step
from irw_optim.schemes import ResamplingSampler, global_weights

ALPHA, SIZE, STEPS = 0.3, 128, (1, 10)
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
WAYS = ("resampling", "reweighting", "normalised")


def flat(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().double()


class Moments(NamedTuple):
    """Mean of vectors, trace of their covariance, and the standard error of that trace."""

    mean: Tensor
    variance: float
    error: float

    @classmethod
    def of(cls, vectors: Tensor) -> "Moments":
        mean = vectors.mean(0)
        squares = (vectors - mean).square().sum(1) * len(vectors) / (len(vectors) - 1)
        return cls(mean, float(squares.mean()), float(squares.std() / len(vectors) ** 0.5))


def draw(
    way: str, weights: Tensor, sampler: ResamplingSampler, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Samples of a batch and what each one's gradient is multiplied with."""
    number, even = len(weights), torch.full((SIZE,), 1 / SIZE)
    if way == "resampling":
        return torch.tensor(list(sampler)), even
    if way == "reweighting":
        drawn = torch.randint(number, (SIZE,), generator=generator)
        return drawn, weights[drawn] * number / SIZE
    drawn = torch.randperm(number, generator=generator)[:SIZE]
    mass = weights[drawn].sum()
    return drawn, weights[drawn] / mass if mass > 0 else even


def displacements(
    model: nn.Module, optimizer: Any, data: Samples, weights: Tensor, way: str, draws: int
) -> dict[int, Moments]:
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    sampler = ResamplingSampler(weights, SIZE, generator=torch.Generator().manual_seed(1))
    generator, start = torch.Generator().manual_seed(2), flat(model)
    moved: dict[int, list[Tensor]] = {steps: [] for steps in STEPS}
    for _ in range(draws):
        for update in range(1, max(STEPS) + 1):
            samples, factors = draw(way, weights, sampler, generator)
            losses = cross_entropy(model(data.x[samples]), data.y[samples])
            optimizer.zero_grad()
            (factors * losses).sum().backward()
            optimizer.step()
            if update in moved:
                moved[update].append(flat(model) - start)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    return {steps: Moments.of(torch.stack(vectors)) for steps, vectors in moved.items()}


def in_closed_form(model: nn.Module, data: Samples, weights: Tensor) -> dict[str, float]:
    """Relative variance of one SGD step of the two unbiased ways, from all per-sample gradients."""
    norms, mean = [], torch.zeros(()).double()
    for x, y, w in zip(data.x.split(512), data.y.split(512), weights.split(512), strict=True):
        G = per_sample_gradients(model, cross_entropy, x, y).double()
        norms.append(G.square().sum(1))
        mean = mean + w.double() @ G
    squares, w, d = torch.cat(norms), weights.double(), float(mean.square().sum())
    return {
        "resampling": (float(w @ squares) - d) / SIZE / d,
        "reweighting": (len(w) * float(w.square() @ squares) - d) / SIZE / d,
    }


def plain_steps(model: nn.Module, optimizer: Any, data: Samples, number: int | None, seed: int):
    for x, y in islice(batches(data, SIZE, seed=seed), number):
        step(model, nn.functional.cross_entropy, optimizer, x, y)


def row_of(name: str, steps: int, moments: dict[str, Moments], draws: int) -> dict[str, Any]:
    """One line of the table; everything relative to resampling's mean displacement."""
    reference = moments["resampling"]
    length = float(reference.mean.square().sum())
    row: dict[str, Any] = {"optimizer": name, "updates": steps}
    for way, m in moments.items():
        row |= {f"{way}: variance": m.variance / length, f"± {way}: variance": m.error / length}
    for way in WAYS[1:]:
        # Squared distance of the means, less what chance alone gives.
        noise = (moments[way].variance + reference.variance) / draws
        distance = float((moments[way].mean - reference.mean).square().sum()) - noise
        row[f"{way}: distance of the mean"] = max(0.0, distance / length) ** 0.5
    return row


def main(given: list[str]) -> None:
    fast = report.options(__doc__, given).fast
    torch.manual_seed(0)
    draws, data = (5, adult()[0][:1000]) if fast else (400, adult()[0])
    model = mlp(data.x.shape[1], 64, 32, 2)
    plain_steps(model, torch.optim.Adam(model.parameters(), lr=1e-3), data, None, seed=0)
    read = loader(data, 512)
    weights = global_weights(model, nn.CrossEntropyLoss(), read, ALPHA, progress=False)
    exact = in_closed_form(model, data, weights)
    table = []
    for name, make in OPTIMIZERS.items():
        copied = copy.deepcopy(model)
        optimizer = make(list(copied.parameters()))
        plain_steps(copied, optimizer, data, 50, seed=1)  # for the optimizer's state
        copied.load_state_dict(model.state_dict())
        found = {way: displacements(copied, optimizer, data, weights, way, draws) for way in WAYS}
        for steps in STEPS:
            table.append(row_of(name, steps, {way: found[way][steps] for way in WAYS}, draws))
            print(table[-1], flush=True)
    print("closed form, one SGD step:", exact)
    settings = {"draws": draws, "batch": SIZE, "alpha": ALPHA, "samples": len(data)}
    settings["effective_sample_size"] = 1 / float(weights.square().sum())
    settings["positive_share"] = float((weights > 0).float().mean())
    report.save("schemes_variance", table, fast, **settings, closed_form_sgd=exact)
