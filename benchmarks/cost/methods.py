"""Time and memory of a step as batch and model grow, against other methods; where the time goes.

    chrt -f 10 python -m benchmarks.cost methods [--fast]     # chrt: see nothing but our work

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
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor

from benchmarks import report
from benchmarks.data.sources import Samples, Sizes, load, split
from benchmarks.methods.intrinsic import Global, Intrinsic
from benchmarks.methods.objectives import arl, chi_square, cvar, group_dro, plain
from benchmarks.training import Method, Recipe, cross_entropy, take_steps
from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.gradients.protocol import PerSampleGradients, align
from irw_optim.measure import median_seconds, peak_bytes
from irw_optim.weighting.outliers import auto_eps, dbscan_noise, distances

ALPHA, STEPS = 0.3, 20
METHODS: dict[str, Callable[[], Method]] = {
    "plain": plain,
    "CVaR": lambda: cvar(ALPHA),
    "χ²-DRO": lambda: chi_square(ALPHA),
    "ARL": arl,
    "GroupDRO": lambda: group_dro("race x sex"),
    "IRW": lambda: Intrinsic(ALPHA),
    "IRW, last layer": lambda: Intrinsic(ALPHA, options={"score_parameters": "last"}),
    "IRWO": lambda: Intrinsic(ALPHA, options={"outliers": DBSCANFilter()}),
    "global": lambda: Global(Intrinsic(ALPHA), refresh=STEPS, unit="steps"),
}
PARTS = ("forward", "back to the layers", "inner products", "distance matrix", "radius", "DBSCAN")
PARTS += ("weighted sum", "Adam")
SKLEARN = "scikit-learn's DBSCAN"


def compare(data: Samples, recipe: Recipe, case: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds and mebibytes of a step."""

    def steps_of(method: Method) -> Callable[[], object]:
        torch.manual_seed(0)
        model = recipe.model(data)
        trainer = method.prepare(model, data, recipe, seed=0)
        return lambda: deque(take_steps(trainer, model, data, STEPS), maxlen=0)

    actions = {name: steps_of(make()) for name, make in METHODS.items()}
    seconds = median_seconds(list(actions.values()), rounds)
    parameters = sum(p.numel() for p in recipe.model(data).parameters())
    held = 4 * (3 * parameters + recipe.batch * data.x.shape[1])
    title = case or f"P = {parameters:,}"
    for (name, action), taken in zip(actions.items(), seconds, strict=True):
        row = {"case": title, "batch": recipe.batch, "parameters": parameters, "method": name}
        yield row | {"ms": 1000 * taken / STEPS, "MiB": (held + peak_bytes(action)) / 2**20}


def profile(data: Samples, batch: int, width: int, irwo: bool, rounds: int) -> dict[str, Any]:
    """Median milliseconds of the parts of an IRW or IRWO step, and of scikit-learn's DBSCAN.

    A weighting rule of our own notes the time between its products. "Inner products" are
    G (G^T 1_S) for IRW, and G G^T for IRWO, which holds them already.
    """
    clock: list[float] = []
    last: list[Any] = []

    def tick(result: Any = None) -> Any:
        clock.append(time.perf_counter())
        return result

    def rule(losses: Tensor, rows: PerSampleGradients, members: Tensor) -> Tensor:
        tick()
        if not irwo:
            scores = align(rows, members.to(losses.dtype))
            clock.extend([time.perf_counter()] * 4)
            return scores
        gram = tick(rows.gram())
        D = tick(distances(gram))
        eps = tick(auto_eps(D, 5))
        kept = tick(~dbscan_noise(D, eps, 5))
        last[:] = D, float(eps)
        return kept * (gram @ (members & kept).to(gram.dtype))

    torch.manual_seed(0)
    recipe = Recipe(lr=1e-3, widths=(width, width))
    model = recipe.model(data)
    optimizer = IRWOptimizer(recipe.optimizer(model), alpha=ALPHA, model=model, weighting=rule)
    taken, warm = [], 10  # the engine's own checks are at steps 1, 2, 4 and 8
    for round_ in range(warm + rounds):
        index = torch.randint(0, len(data), (batch,))
        optimizer.zero_grad()
        clock.clear()
        tick()
        losses = tick(cross_entropy(model(data.x[index]), data.y[index]))
        tick(optimizer.backward(losses))
        tick(optimizer.step())
        if round_ >= warm:
            taken.append([1000 * (b - a) for a, b in itertools.pairwise(clock)])
    optimizer.detach()
    found: dict[str, Any] = {"batch": batch, "width": width, "method": "IRWO" if irwo else "IRW"}
    found |= dict(zip(PARTS, map(statistics.median, zip(*taken, strict=True)), strict=True))
    if irwo:
        D, eps = last
        clusters = DBSCAN(eps=eps, min_samples=5, metric="precomputed")
        (seconds,) = median_seconds([lambda: clusters.fit_predict(D.numpy())], rounds)
        found[SKLEARN] = 1000 * seconds
    return found


def texts(frame: pd.DataFrame, profiles: pd.DataFrame) -> dict[str, str]:
    cases = dict(list(frame.groupby("case", sort=False)))
    found = {}
    for name, key in (("cost_time", "ms"), ("cost_memory", "MiB")):
        columns = [own.set_index("method")[key] for own in cases.values()]
        lines = [[f"plain, {key}", *(f"{own['plain']:.2f}" for own in columns)]]
        lines += [
            [method, *(f"{own[method] / own['plain']:.2f}" for own in columns)]
            for method in list(METHODS)[1:]
        ]
        found[name] = report.table(["", *cases], lines)
    lines = []
    for row in profiles.to_dict("records"):
        step = sum(row[part] for part in PARTS)
        shares = [f"{100 * row[part] / step:.0f}" for part in PARTS]
        other = row.get(SKLEARN)
        shares.append("" if pd.isna(other) else f"{100 * other / step:.0f}")
        title = f"{row['method']}, B = {row['batch']}, width {row['width']}"
        lines.append([title, f"{step:.2f}", *shares])
    head = ["share of the step, %", "step, ms", *PARTS, SKLEARN]
    return {**found, "cost_profile": report.table(head, lines)}


def draw(frame: pd.DataFrame) -> None:
    growth = {
        "batch": frame["case"].str.startswith("B"),
        "parameters": frame["case"].str.startswith("P"),
    }
    with report.figure("cost.png", 2, 2, (9, 6.4)) as axes:
        for column, (along, chosen) in enumerate(growth.items()):
            for i, (method, own) in enumerate(frame[chosen].groupby("method", sort=False)):
                for axis, key in zip(axes[:, column], ("ms", "MiB"), strict=True):
                    axis.loglog(own[along], own[key], "o-", color=f"C{i}", label=method, ms=4)
                    axis.set(xlabel=along, ylabel=f"{key} a step")


def measure(fast: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The comparison, and the parts of a step."""
    rounds = 2 if fast else 7
    data = split(load("adult"), 0, Sizes(train=2000 if fast else 16000))[0]
    recipe, rows = Recipe(batch=128), []
    for batch in (32, 128, 512, 1024)[: 2 if fast else None]:
        rows += compare(data, replace(recipe, batch=batch), f"B = {batch}", rounds)
    for width in (32, 128, 512)[: 1 if fast else None]:
        rows += compare(data, replace(recipe, widths=(width, width)), "", rounds)
    works = [(128, 64), (512, 64), (1024, 64), (128, 512)][: 1 if fast else None]
    parts = [profile(data, b, w, irwo, 5 * rounds) for irwo in (False, True) for b, w in works]
    return pd.DataFrame(rows), pd.DataFrame(parts)


def main(given: list[str]) -> None:
    fast = report.options(__doc__, given).fast
    frame, profiles = measure(fast)
    for stem, text in texts(frame, profiles).items():
        print(f"\n{stem}\n{text}")
        if not fast:
            report.write(stem, text)
    if not fast:
        report.store("cost", frame)
        report.store("cost_profile", profiles)
        draw(frame)
