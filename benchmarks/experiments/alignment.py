"""Do IRW's weights follow alignment with the worst-off group's gradient, and not the loss?

    python -m benchmarks.experiments.alignment [--fast]

An MLP 64-32 on 4,000 people of UCI Adult and of Law School, with cross entropy and with the squared
error of the predicted probabilities, whose gradient vanishes where the model is sure and wrong: a
large loss with a small gradient. Weights at alpha 0.3 at the start, and after training by IRW and
plainly; means over ten batches of 128, with explicit per-sample gradients:

    rank correlation (Spearman's) of the weight with the cosine of g_i and g_S, with |g_i|, and with
    the loss, also among the samples of the one class that has most of the weight
    the weight of S, the worst-off by loss: its share of the total, how many of S have none, and
    the mean weight of each third of S in that class, in order of the loss
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments import report
from benchmarks.fairness.data import Samples, Sizes, load, split
from benchmarks.fairness.files import find
from benchmarks.fairness.loop import mlp, shuffled
from irw_optim import IRWOptimizer, irw_weights, worst_off

ALPHA, BATCH, BATCHES = 0.3, 128, 10
THIRDS = ("least", "middle", "worst")
NAMES = {"adult": "Adult", "law_school": "Law School"}
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.softmax(1) - torch.eye(2)[y]).square().sum(1)


LOSSES: dict[str, Loss] = {"cross entropy": cross_entropy, "squared error": squared_error}


def gradients(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """G, (B, P)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (one[None],))
        return loss(output, label[None]).squeeze(0)

    rows = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(parameters, x, y)
    return torch.cat([block.flatten(1) for block in rows.values()], dim=1)


def look(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> dict[str, float]:
    """What the weights of one batch follow."""
    with torch.no_grad():
        losses = loss(model(x), y)
    G = gradients(model, loss, x, y)
    S = worst_off(losses, ALPHA)
    w = irw_weights(losses, G, ALPHA)
    g_S = G[S].sum(0)
    lengths = G.norm(dim=1)
    cosines = G @ g_S / (lengths * g_S.norm()).clamp(min=1e-30)
    same = y == (1 if w[y == 1].sum() > 0.5 else 0)
    inside = (S & same).nonzero().flatten()
    thirds = w[inside[losses[inside].argsort()]].tensor_split(3)
    return {
        "weight and cosine": rank_correlation(w, cosines),
        "weight and |g|": rank_correlation(w, lengths),
        "weight and loss": rank_correlation(w, losses),
        "weight and cosine, one class": rank_correlation(w[same], cosines[same]),
        "weight and |g|, one class": rank_correlation(w[same], lengths[same]),
        "weight and loss, one class": rank_correlation(w[same], losses[same]),
        "|g| and loss": rank_correlation(lengths, losses),
        "weight of S": float(w[S].sum()),
        "no weight in S": float((w[S] == 0).double().mean()),
        **{
            f"{n} third of S": len(y) * float(t.mean()) for n, t in zip(THIRDS, thirds, strict=True)
        },
        "heavier class": float(w[same].sum()),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the batches; those with nobody in a third do not count there."""
    columns = {key: [row[key] for row in rows if not math.isnan(row[key])] for key in rows[0]}
    return {key: statistics.mean(own) if own else math.nan for key, own in columns.items()}


def trained(data: Samples, loss: Loss, weighting: str, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp(data.x.shape[1], (64, 32), 2)
    optimizer = IRWOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        alpha=ALPHA,
        model=model,
        weighting=weighting,
    )
    for index in itertools.islice(shuffled(len(data), BATCH, seed), steps):
        optimizer.zero_grad()
        optimizer.backward(loss(model(data.x[index]), data.y[index]))
        optimizer.step()
    optimizer.detach()
    return model


def states(data: Samples, loss: Loss, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """What the weights follow at the start, and after training by IRW and plainly."""
    found = {}
    for state, weighting in (("start", ""), ("by IRW", "irw"), ("plain", "uniform")):
        model = trained(data, loss, weighting or "irw", steps if weighting else 0, seed)
        parts = itertools.islice(shuffled(len(data), BATCH, seed + 1000), BATCHES)
        found[state] = average([look(model, loss, data.x[i], data.y[i]) for i in parts])
    return found


def run(fast: bool) -> report.Result:
    names = [name for name in NAMES if find(name) is not None]
    size, steps, seeds = (1000, 60, range(2)) if fast else (4000, 600, range(5))
    cases = []
    for name in names[:1] if fast else names:
        source = load(name)
        for loss_name, loss in LOSSES.items():
            runs = [
                states(split(source, seed, Sizes(train=size))[0], loss, steps, seed)
                for seed in seeds
            ]
            cases.append({"data": NAMES[name], "loss": loss_name, "runs": runs})
            print(NAMES[name], loss_name, flush=True)
    return {"size": size, "steps": steps, "seeds": list(seeds), "alpha": ALPHA, "cases": cases}


CORRELATIONS = [
    "weight and cosine",
    "weight and |g|",
    "weight and loss",
]
LENGTH_AND_LOSS = "|g| and loss"
INSIDE = [f"{name}, one class" for name in CORRELATIONS]


def texts(result: report.Result) -> dict[str, str]:
    correlations, inside, tail = [], [], []
    for case in result["cases"]:
        for state in case["runs"][0]:
            name = f"{case['data']}, {case['loss']}, {state}"

            def over_seeds(key: str, case: Any = case, state: str = state) -> list[float]:
                return [one[state][key] for one in case["runs"]]

            correlations.append([name, *(report.spread(over_seeds(k)) for k in CORRELATIONS)])
            inside.append(
                [name, *(report.spread(over_seeds(k)) for k in [*INSIDE, LENGTH_AND_LOSS])]
            )
            tail.append(
                [
                    name,
                    report.spread(over_seeds("weight of S"), 0, 100),
                    report.spread(over_seeds("no weight in S"), 0, 100),
                    *(report.spread(over_seeds(f"{third} third of S")) for third in THIRDS),
                    report.spread(over_seeds("heavier class"), 0, 100),
                ]
            )
    return {
        "alignment_correlations": report.table(["", *CORRELATIONS], correlations),
        "alignment_one_class": report.table(["", *INSIDE, LENGTH_AND_LOSS], inside),
        "alignment_tail": report.table(
            [
                "",
                "weight on S, %",
                "of S without weight, %",
                *(f"B × weight, {third} third" for third in THIRDS),
                "weight on one class, %",
            ],
            tail,
        ),
        "alignment_findings": findings(result),
    }


def findings(result: report.Result) -> str:
    lines = []
    for loss in LOSSES:
        rows = [
            one[state]
            for case in result["cases"]
            if case["loss"] == loss
            for one in case["runs"]
            for state in ("by IRW", "plain")
        ]

        def over(key: str, rows: list[dict[str, float]] = rows) -> str:
            return report.spread([row[key] for row in rows])

        lines.append(
            f"- **{loss}**, trained models ({len(rows)} of them): the weight's rank correlation "
            f"with the cosine is {over('weight and cosine')}, with the loss "
            f"{over('weight and loss')}. Inside the class that has the weight it is "
            f"{over('weight and cosine, one class')} with the cosine and "
            f"{over('weight and loss, one class')} with the loss."
        )
    return "\n".join(lines) + "\n"


def draw(result: report.Result, folder: Path) -> None:
    """One batch of one model: who gets the weight, against loss and cosine."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    data = split(load("adult"), 0, Sizes(train=result["size"]))[0]
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.4), layout="constrained")
    for row, (name, loss) in zip(axes, LOSSES.items(), strict=True):
        model = trained(data, loss, "uniform", result["steps"], 0)
        i = next(shuffled(len(data), BATCH, 1000))
        with torch.no_grad():
            losses = loss(model(data.x[i]), data.y[i])
        G = gradients(model, loss, data.x[i], data.y[i])
        g_S = G[worst_off(losses, ALPHA)].sum(0)
        w = BATCH * irw_weights(losses, G, ALPHA)
        cosines = G @ g_S / (G.norm(dim=1) * g_S.norm())
        for axis, (label, values) in zip(
            row, {"loss": losses, "cosine of g_i and g_S": cosines}.items(), strict=True
        ):
            for y, (colour, marker) in enumerate([("#0072B2", "o"), ("#D55E00", "^")]):
                of = data.y[i] == y
                axis.scatter(values[of], w[of], s=16, c=colour, marker=marker, label=f"class {y}")
            axis.set_xlabel(f"{label} ({name})")
            axis.set_ylabel("B × weight")
            axis.grid(color="#e4e4e4")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.savefig(folder / "alignment.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
