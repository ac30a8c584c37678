"""Time and memory of a step as batch, model and data set grow, and where the time goes.

    chrt -f 10 python -m benchmarks.experiments.cost [--fast]     # chrt: see nothing but our work

An MLP of two equal hidden layers on UCI Adult, cross entropy, Adam; one thread of a CPU. All
methods take their steps in turns in one process, twenty at a time (so that a renewal of the global
weights every twenty steps is in), and times are medians over the rounds, divided by plain
training's. Memory is that of the parameters, of Adam's two moments and of the batch, and the most
bytes of tensors that a step holds beyond them.
JTT takes plain steps, and its first stage before them: it is not shown.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import DBSCAN
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.experiments import report
from benchmarks.fairness.data import Samples, Sizes, load, split
from benchmarks.fairness.loop import Method, Recipe, mlp
from benchmarks.fairness.methods.intrinsic import Global, Intrinsic
from benchmarks.fairness.methods.objectives import arl, chi_square, cvar, group_dro, plain
from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.gradients.protocol import PerSampleGradients, align
from irw_optim.measure import median_seconds, peak_bytes
from irw_optim.schemes import global_weights
from irw_optim.weighting.outliers import auto_eps, dbscan_noise, distances

ALPHA, STEPS = 0.3, 20
LOCAL = Intrinsic(ALPHA)
METHODS: dict[str, Callable[[], Method]] = {
    "plain": plain,
    "CVaR": lambda: cvar(ALPHA),
    "χ²-DRO": lambda: chi_square(ALPHA),
    "ARL": arl,
    "GroupDRO": lambda: group_dro("race x sex"),
    "IRW": lambda: LOCAL,
    "IRW, last layer": lambda: Intrinsic(ALPHA, options={"score_parameters": "last"}),
    "IRWO": lambda: Intrinsic(ALPHA, options={"outliers": DBSCANFilter()}),
    "global": lambda: Global(LOCAL, refresh=STEPS, unit="steps"),
}
BATCHES, WIDTHS, SIZES = (32, 128, 512, 1024), (32, 128, 512), (1000, 4000, 16000)


def steps_of(method: Method, data: Samples, recipe: Recipe) -> Callable[[], None]:
    """A function that trains on for twenty steps."""
    torch.manual_seed(0)
    model = mlp(data.x.shape[1], recipe.widths, data.classes)
    trainer = method.prepare(model, data, recipe, seed=0)

    def steps() -> None:
        for index in itertools.islice(trainer.batches, STEPS):
            trainer.optimizer.zero_grad()
            losses = F.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
            trainer.backward(losses, index)
            trainer.optimizer.step()

    return steps


def compare(data: Samples, recipe: Recipe, rounds: int) -> dict[str, Any]:
    """Milliseconds and mebibytes of a step."""
    actions = {name: steps_of(make(), data, recipe) for name, make in METHODS.items()}
    seconds = median_seconds(list(actions.values()), rounds)
    parameters = sum(p.numel() for p in mlp(data.x.shape[1], recipe.widths, 2).parameters())
    held = 4 * (3 * parameters + recipe.batch * data.x.shape[1])
    return {
        name: {"ms": 1000 * taken / STEPS, "MiB": (held + peak_bytes(action)) / 2**20}
        for (name, action), taken in zip(actions.items(), seconds, strict=True)
    }


def renewal(data: Samples, size: int, rounds: int) -> dict[str, float]:
    """Seconds of the weights of N samples, and of a plain epoch over them."""
    part = data[torch.arange(size)]
    recipe = Recipe(batch=128, steps=0)
    model = mlp(part.x.shape[1], recipe.widths, part.classes)
    batches = [(part.x[i], part.y[i]) for i in torch.arange(size).split(128)]
    plain_model = mlp(part.x.shape[1], recipe.widths, part.classes)
    optimizer = recipe.optimizer(plain_model)

    def epoch() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(plain_model(x), y).backward()
            optimizer.step()

    def renew() -> Tensor:
        positions: Any = range(size)
        loader: Any = DataLoader(positions, batch_size=512, collate_fn=torch.tensor)
        return global_weights(
            model,
            nn.CrossEntropyLoss(),
            loader,
            ALPHA,
            forward=lambda network, i: (network(part.x[i]), part.y[i]),
            progress=False,
        )

    taken, plain_epoch = median_seconds([renew, epoch], rounds)
    return {"N": size, "renewal, s": taken, "plain epoch, s": plain_epoch}


PARTS = (
    "forward",
    "back to the layers",
    "inner products",
    "distance matrix",
    "radius",
    "DBSCAN",
    "weighted sum",
    "Adam",
)


def profile(data: Samples, batch: int, width: int, irwo: bool, rounds: int) -> dict[str, Any]:
    """Median milliseconds of the parts of an IRW or IRWO step, and of scikit-learn's DBSCAN.

    A weighting rule of our own notes the time between its products. "Inner products" are
    G (G^T 1_S) for IRW, and G G^T for IRWO, which holds them already.
    """
    clock: list[float] = []
    matrices: list[tuple[Tensor, float]] = []

    def tick() -> None:
        clock.append(time.perf_counter())

    def rule(losses: Tensor, rows: PerSampleGradients, members: Tensor) -> Tensor:
        tick()
        if not irwo:
            scores = align(rows, members.to(losses.dtype))
            clock.extend([time.perf_counter()] * 4)
            return scores
        gram = rows.gram()
        tick()
        D = distances(gram)
        tick()
        eps = auto_eps(D, 5)
        tick()
        kept = ~dbscan_noise(D, eps, 5)
        tick()
        matrices[:] = [(D, float(eps))]
        return kept * (gram @ (members & kept).to(gram.dtype))

    torch.manual_seed(0)
    model = mlp(data.x.shape[1], (width, width), data.classes)
    inner = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = IRWOptimizer(inner, alpha=ALPHA, model=model, weighting=rule)
    taken = []
    warm = 10  # the engine's own checks are at steps 1, 2, 4 and 8
    for round_ in range(warm + rounds):
        index = torch.randint(0, len(data), (batch,))
        optimizer.zero_grad()
        clock.clear()
        tick()
        losses = F.cross_entropy(model(data.x[index]), data.y[index], reduction="none")
        tick()
        optimizer.backward(losses)
        tick()
        optimizer.step()
        tick()
        if round_ >= warm:
            taken.append([1000 * (b - a) for a, b in itertools.pairwise(clock)])
    optimizer.detach()
    found: dict[str, Any] = {"batch": batch, "width": width, "method": "IRWO" if irwo else "IRW"}
    found |= dict(zip(PARTS, map(statistics.median, zip(*taken, strict=True)), strict=True))
    if irwo:
        ((D, eps),) = matrices
        clusters = DBSCAN(eps=eps, min_samples=5, metric="precomputed")
        seconds = median_seconds([lambda: clusters.fit_predict(D.numpy())], rounds)
        found["scikit-learn's DBSCAN"] = 1000 * seconds[0]
    return found


def run(fast: bool) -> report.Result:
    rounds = 2 if fast else 7
    data = split(load("adult"), 0, Sizes(train=2000 if fast else 16000))[0]
    recipe = Recipe(batch=128)
    batches = {
        b: compare(data, replace(recipe, batch=b), rounds)
        for b in (BATCHES[:2] if fast else BATCHES)
    }
    widths = {
        w: compare(data, replace(recipe, widths=(w, w)), rounds)
        for w in (WIDTHS[:1] if fast else WIDTHS)
    }
    sizes = [renewal(data, n, rounds) for n in (SIZES[:1] if fast else SIZES)]
    profiles = [
        profile(data, b, w, irwo, 5 * rounds)
        for irwo in (False, True)
        for b, w in [(128, 64), (512, 64), (1024, 64), (128, 512)][: 1 if fast else 4]
    ]
    parameters = {
        w: sum(p.numel() for p in mlp(data.x.shape[1], (w, w), 2).parameters()) for w in widths
    }
    return {
        "rounds": rounds,
        "batches": batches,
        "widths": widths,
        "parameters": parameters,
        "sizes": sizes,
        "profiles": profiles,
    }


def texts(result: report.Result) -> dict[str, str]:
    batches, widths, parameters = result["batches"], result["widths"], result["parameters"]
    time_rows, memory_rows = [], []
    cases = {f"B = {b}": found for b, found in batches.items()}
    cases |= {f"P = {parameters[w]:,}": found for w, found in widths.items()}
    for method in next(iter(cases.values())):
        if method == "plain":
            time_rows.append(["plain, ms", *(f"{c['plain']['ms']:.2f}" for c in cases.values())])
            memory_rows.append(
                ["plain, MiB", *(f"{c['plain']['MiB']:.2f}" for c in cases.values())]
            )
            continue
        for rows, key in ((time_rows, "ms"), (memory_rows, "MiB")):
            ratios = [f"{c[method][key] / c['plain'][key]:.2f}" for c in cases.values()]
            rows.append([method, *ratios])
    profiles = []
    for found in result["profiles"]:
        step = sum(found[part] for part in PARTS)
        sklearn = found.get("scikit-learn's DBSCAN")
        profiles.append(
            [
                f"{found['method']}, B = {found['batch']}, width {found['width']}",
                f"{step:.2f}",
                *(f"{100 * found[part] / step:.0f}" for part in PARTS),
                "" if sklearn is None else f"{100 * sklearn / step:.0f}",
            ]
        )
    sizes = [
        [
            f"{row['N']:,}",
            f"{row['renewal, s']:.3f}",
            f"{row['plain epoch, s']:.3f}",
            f"{row['renewal, s'] / row['plain epoch, s']:.2f}",
        ]
        for row in result["sizes"]
    ]
    return {
        "cost_time": report.table(["", *cases], time_rows),
        "cost_memory": report.table(["", *cases], memory_rows),
        "cost_profile": report.table(
            ["share of the step, %", "step, ms", *PARTS, "scikit-learn's DBSCAN"], profiles
        ),
        "cost_sizes": report.table(["N", "renewal, s", "plain epoch, s", "ratio"], sizes),
    }


def draw(result: report.Result, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    growth = {
        "batch size B": ([int(b) for b in result["batches"]], list(result["batches"].values())),
        "parameters P": (
            [result["parameters"][w] for w in result["widths"]],
            list(result["widths"].values()),
        ),
    }
    colours = ["#000000", "#56B4E9", "#009E73", "#F0E442", "#999999"]
    colours += ["#D55E00", "#E69F00", "#CC79A7", "#0072B2"]
    for column, (title, (where, cases)) in enumerate(growth.items()):
        for row, (key, unit) in enumerate({"ms": "milliseconds", "MiB": "MiB"}.items()):
            axis = axes[row][column]
            for method, colour in zip(cases[0], colours, strict=True):
                values = [case[method][key] for case in cases]
                axis.loglog(where, values, "o-", color=colour, label=method, markersize=4)
            axis.set_xlabel(title)
            axis.set_ylabel(f"{unit} a step")
            axis.grid(which="major", color="#e4e4e4")
            axis.spines[["top", "right"]].set_visible(False)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(folder / "cost.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
