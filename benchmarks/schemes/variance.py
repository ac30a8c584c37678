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
divided by the squared norm of resampling's mean displacement. For one SGD step the first two are
also computed in closed form, from all N per-sample gradients.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.schemes.shared import FIGURES, Split, adult, batches, loader, mlp, save
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


class Moments:
    """Mean and covariance trace of vectors that come one by one."""

    def __init__(self) -> None:
        self.number, self.total, self.squares = 0, torch.zeros(()).double(), 0.0
        self.values: list[float] = []

    def add(self, vector: Tensor) -> None:
        self.number += 1
        self.total = self.total + vector
        self.squares += float(vector.square().sum())

    @property
    def mean(self) -> Tensor:
        return self.total / self.number

    @property
    def variance(self) -> float:
        spread = self.squares / self.number - float(self.mean.square().sum())
        return spread * self.number / (self.number - 1)


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
    moments = {steps: Moments() for steps in STEPS}
    for _ in range(draws):
        for step in range(1, max(STEPS) + 1):
            samples, factors = draw(way, weights, size, sampler, generator)
            losses = nn.functional.cross_entropy(
                model(data.x[samples]), data.y[samples], reduction="none"
            )
            optimizer.zero_grad()
            (factors * losses).sum().backward()
            optimizer.step()
            if step in moments:
                moments[step].add(flat(model) - start)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(copy.deepcopy(state[1]))
    return moments


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


def figure(table: list[dict]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STEPS), figsize=(9, 3.4), layout="constrained")
    for axis, steps in zip(axes, STEPS, strict=True):
        for i, way in enumerate(WAYS):
            rows = [r for r in table if r["steps"] == steps and r["way"] == way]
            places = [j + 0.27 * (i - 1) for j in range(len(rows))]
            axis.bar(places, [r["variance"] for r in rows], 0.25, label=way)
        axis.set_yscale("log")
        axis.set_xticks(range(len(OPTIMIZERS)), OPTIMIZERS)
        axis.set_title("one update" if steps == 1 else f"{steps} updates in a row")
        axis.set_ylabel("variance / squared mean")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "schemes_variance.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="40 draws instead of 400")
    parser.add_argument("--alpha", type=float, default=0.3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draws, size = (40, 128) if arguments.fast else (400, 128)

    data = adult()[0]
    model = mlp(data.x.shape[1], 64, 32)
    warm_up = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in batches(data, size, seed=0):
        warm_up.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        warm_up.step()
    weights = global_weights(
        model, nn.CrossEntropyLoss(), loader(data, 512), arguments.alpha, progress=False
    )
    ess = 1 / float(weights.square().sum())
    exact = in_closed_form(model, data, weights, size)
    print(
        f"effective sample size {ess:.0f} of {len(data)}; "
        f"{float((weights > 0).float().mean()):.0%} of the weights are positive"
    )

    table = []
    for name, make in OPTIMIZERS.items():
        trained = copy.deepcopy(model)
        optimizer = make(list(trained.parameters()))
        for step, (x, y) in enumerate(batches(data, size, seed=1)):
            if step == 50:
                break
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(x), y).backward()
            optimizer.step()
        trained.load_state_dict(model.state_dict())  # the optimizer's state, at the same model
        moments = {
            way: displacements(trained, optimizer, data, weights, way, size, draws) for way in WAYS
        }
        for steps in STEPS:
            reference = moments["resampling"][steps].mean
            length = float(reference.square().sum())
            for way in WAYS:
                m = moments[way][steps]
                # Squared distance of the means, less what chance alone gives.
                noise = (m.variance + moments["resampling"][steps].variance) / draws
                distance = float((m.mean - reference).square().sum()) - noise
                row = {"optimizer": name, "steps": steps, "way": way}
                row |= {"variance": m.variance / length, "bias": max(0.0, distance / length) ** 0.5}
                table.append(row)
                print(
                    f"{name:9} {steps:2} steps  {way:12} variance {row['variance']:8.3f}"
                    f"  distance of the mean {row['bias']:.3f}"
                )
    print("closed form, one SGD step:", {way: round(value, 3) for way, value in exact.items()})
    rows = []
    for name in OPTIMIZERS:
        for steps in STEPS:
            row: dict[str, Any] = {"optimizer": name, "updates": steps}
            for way in WAYS:
                (found,) = (
                    r for r in table if (r["optimizer"], r["steps"], r["way"]) == (name, steps, way)
                )
                row[f"{way}: variance"] = round(found["variance"], 4)
                if way != "resampling":
                    row[f"{way}: distance of the mean"] = found["bias"]
            rows.append(row)
    save(
        "schemes_variance",
        rows,
        arguments.fast,
        seeds=[0, 1, 2],
        draws=draws,
        batch=size,
        alpha=arguments.alpha,
        effective_sample_size=ess,
        closed_form_sgd=exact,
    )
    if not arguments.fast:
        figure(table)


if __name__ == "__main__":
    main()
