"""Variance of the update, resampling against reweighting, at the same weights and model state.

    python -m benchmarks.schemes.variance [--fast]

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

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.schemes.data import Split, adult, batches, loader
from benchmarks.schemes.models import mlp
from benchmarks.schemes.results import save
from irw_optim.schemes import ResamplingSampler, global_weights

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
WAYS = ("resampling", "reweighting", "normalised")
STEPS = (1, 10)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


class Moments(NamedTuple):
    """Mean of vectors, trace of their covariance, and the standard error of that trace."""

    mean: Tensor
    variance: float
    error: float

    @classmethod
    def of(cls, vectors: Tensor) -> Moments:
        mean = vectors.mean(0)
        squares = (vectors - mean).square().sum(1) * len(vectors) / (len(vectors) - 1)
        return cls(mean, float(squares.mean()), float(squares.std() / len(vectors) ** 0.5))


def draw(
    way: str, weights: Tensor, size: int, sampler: ResamplingSampler, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Samples of a batch and what each one's gradient is multiplied with."""
    number = len(weights)
    if way == "resampling":
        return torch.tensor(list(sampler)), torch.full((size,), 1 / size)
    if way == "reweighting":
        drawn = torch.randint(number, (size,), generator=generator)
        return drawn, weights[drawn] * number / size
    drawn = torch.randperm(number, generator=generator)[:size]
    mass = weights[drawn].sum()
    return drawn, weights[drawn] / mass if mass > 0 else torch.full((size,), 1 / size)


def displacements(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Split,
    weights: Tensor,
    way: str,
    size: int,
    draws: int,
) -> dict[int, Moments]:
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    sampler = ResamplingSampler(weights, size, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    start = flat(model)
    moved: dict[int, list[Tensor]] = {steps: [] for steps in STEPS}
    for _ in range(draws):
        for step in range(1, max(STEPS) + 1):
            samples, factors = draw(way, weights, size, sampler, generator)
            losses = nn.functional.cross_entropy(
                model(data.x[samples]), data.y[samples], reduction="none"
            )
            optimizer.zero_grad()
            (factors * losses).sum().backward()
            optimizer.step()
            if step in moved:
                moved[step].append(flat(model) - start)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    return {steps: Moments.of(torch.stack(vectors)) for steps, vectors in moved.items()}


def in_closed_form(model: nn.Module, data: Split, weights: Tensor, size: int) -> dict[str, float]:
    """Relative variance of one SGD step of the two unbiased ways, from all per-sample gradients."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, parameters, x.unsqueeze(0))
        return nn.functional.cross_entropy(output, y.unsqueeze(0))

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    norms, mean = [], torch.zeros(()).double()
    pieces = zip(data.x.split(512), data.y.split(512), weights.split(512), strict=True)
    for x, y, w in pieces:
        G = torch.cat([g.flatten(1) for g in rows(parameters, x, y).values()], 1).double()
        norms.append(G.square().sum(1))
        mean = mean + w.double() @ G
    squares, w, d = torch.cat(norms), weights.double(), float(mean.square().sum())
    return {
        "resampling": (float(w @ squares) - d) / size / d,
        "reweighting": (len(w) * float(w.square() @ squares) - d) / size / d,
    }


def with_state(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], model: nn.Module, data: Split, size: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the model, and an optimizer with the state it has after 50 plain steps."""
    copied = copy.deepcopy(model)
    optimizer = make(list(copied.parameters()))
    for _, (x, y) in zip(range(50), batches(data, size, seed=1), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(copied(x), y).backward()
        optimizer.step()
    copied.load_state_dict(model.state_dict())
    return copied, optimizer


def row_of(name: str, steps: int, moments: dict[str, Moments], draws: int) -> dict[str, Any]:
    """One line of the table; everything relative to resampling's mean displacement."""
    reference = moments["resampling"]
    length = float(reference.mean.square().sum())
    row: dict[str, Any] = {"optimizer": name, "updates": steps}
    for way, m in moments.items():
        row[f"{way}: variance"] = (m.variance / length, m.error / length)
    for way, m in moments.items():
        if way != "resampling":
            # Squared distance of the means, less what chance alone gives.
            noise = (m.variance + reference.variance) / draws
            distance = float((m.mean - reference.mean).square().sum()) - noise
            row[f"{way}: distance of the mean"] = max(0.0, distance / length) ** 0.5
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="5 draws instead of 400, 1,000 samples")
    parser.add_argument("--alpha", type=float, default=0.3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draws, size = (5, 128) if arguments.fast else (400, 128)

    data = adult()[0]
    if arguments.fast:
        data = data[:1000]
    model = mlp(data.x.shape[1], 64, 32)
    warm_up = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in batches(data, size, seed=0):
        warm_up.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        warm_up.step()
    weights = global_weights(
        model, nn.CrossEntropyLoss(), loader(data, 512), arguments.alpha, progress=False
    )
    exact = in_closed_form(model, data, weights, size)

    table = []
    for name, make in OPTIMIZERS.items():
        copied, optimizer = with_state(make, model, data, size)
        found = {
            way: displacements(copied, optimizer, data, weights, way, size, draws) for way in WAYS
        }
        for steps in STEPS:
            table.append(row_of(name, steps, {way: found[way][steps] for way in WAYS}, draws))
            print(table[-1], flush=True)
    print("closed form, one SGD step:", exact)
    save(
        "schemes_variance",
        table,
        arguments.fast,
        seeds=[0, 1, 2],
        draws=draws,
        batch=size,
        alpha=arguments.alpha,
        samples=len(data),
        effective_sample_size=1 / float(weights.square().sum()),
        positive_share=float((weights > 0).float().mean()),
        closed_form_sgd=exact,
    )


if __name__ == "__main__":
    main()
