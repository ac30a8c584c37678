"""Do IRW's weights follow alignment with the worst-off group's gradient, and not the loss?

An MLP 64-32 on 4,000 people of UCI Adult and of Law School, with cross entropy and with the squared
error of the predicted probabilities, whose gradient vanishes where the model is sure and wrong: a
large loss with a small gradient. Weights at alpha 0.3 at the start, and after training by IRW and
plainly; means over ten batches of 128, with explicit per-sample gradients:

    rank correlation (Spearman's) of the weight with the cosine of g_i and g_S, with |g_i|, and with
    the loss, also among the samples of the one class that has most of the weight
    the weight of S, the worst-off by loss: its share of the total, how many of S have none, and
    the mean weight of each third of S in that class, in order of the loss
"""

import itertools
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import report
from benchmarks.data.memory import shuffled
from benchmarks.data.sources import Samples, Sizes, adult, adult_and_law, split
from benchmarks.methods.intrinsic import Intrinsic
from benchmarks.models import per_sample_gradients
from benchmarks.training import Loss, Recipe, cross_entropy, take_steps
from irw_optim import irw_weights, worst_off

ALPHA, BATCH, BATCHES = 0.3, 128, 10
THIRDS = tuple(f"{which} third of S" for which in ("least", "middle", "worst"))
RECIPE = Recipe(batch=BATCH, lr=1e-3)


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.softmax(1) - torch.eye(2)[y]).square().sum(1)


LOSSES: dict[str, Loss] = {"cross entropy": cross_entropy, "squared error": squared_error}


def weights_of(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Losses, lengths and cosines of the gradients, S and the weights of one batch, (B,) each."""
    with torch.no_grad():
        losses = loss(model(x), y)
    G, S = per_sample_gradients(model, loss, x, y), worst_off(losses, ALPHA)
    g_S, lengths = G[S].sum(0), G.norm(dim=1)
    cosines = G @ g_S / (lengths * g_S.norm()).clamp(min=1e-30)
    seen = {"loss": losses, "|g|": lengths, "cosine": cosines}
    return {**seen, "S": S, "w": irw_weights(losses, G, ALPHA)}


def look(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> dict[str, float]:
    """What the weights of one batch follow."""
    found = weights_of(model, loss, x, y)
    w, S = found["w"], found["S"]
    same = y == (1 if w[y == 1].sum() > 0.5 else 0)
    row = {"|g| and loss": rank_correlation(found["|g|"], found["loss"])}
    for name in ("cosine", "|g|", "loss"):
        row[f"weight and {name}"] = rank_correlation(w, found[name])
        row[f"weight and {name}, one class"] = rank_correlation(w[same], found[name][same])
    inside = (S & same).nonzero().flatten()
    thirds = w[inside[found["loss"][inside].argsort()]].tensor_split(3)
    row |= {name: len(y) * float(t.mean()) for name, t in zip(THIRDS, thirds, strict=True)}
    row |= {"weight of S": float(w[S].sum()), "heavier class": float(w[same].sum())}
    return row | {"no weight in S": float((w[S] == 0).double().mean())}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def trained(data: Samples, loss: Loss, weighting: str, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = RECIPE.model(data)
    trainer = Intrinsic(ALPHA, 0.0, {"weighting": weighting}).prepare(model, data, RECIPE, seed)
    list(take_steps(trainer, model, data, steps, loss))
    trainer.optimizer.detach()
    return model


def run(fast: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    size, steps, seeds = (1000, 60, range(2)) if fast else (4000, 600, range(5))
    states = {"start": ("irw", 0), "by IRW": ("irw", steps), "plain": ("uniform", steps)}
    rows = []
    for name, source in adult_and_law(fast):
        for (loss_name, loss), seed in itertools.product(LOSSES.items(), seeds):
            data = split(source, seed, Sizes(train=size))[0]
            for state, (weighting, taken) in states.items():
                model = trained(data, loss, weighting, taken, seed)
                parts = itertools.islice(shuffled(size, BATCH, seed + 1000), BATCHES)
                seen = pd.DataFrame(look(model, loss, data.x[i], data.y[i]) for i in parts)
                row = {"data": name, "loss": loss_name, "state": state, "seed": seed}
                rows.append(row | seen.mean().to_dict())  # nobody in a third does not count there
            print(name, loss_name, seed, flush=True)
    return rows, {"size": size, "steps": steps, "alpha": ALPHA}


CORRELATIONS = ["weight and cosine", "weight and |g|", "weight and loss"]
INSIDE = [*(f"{name}, one class" for name in CORRELATIONS), "|g| and loss"]
TABLES = {
    "correlations": {name: (name, 2, 1) for name in CORRELATIONS},
    "one_class": {name: (name, 2, 1) for name in INSIDE},
    "tail": {
        "weight on S, %": ("weight of S", 0, 100),
        "of S without weight, %": ("no weight in S", 0, 100),
        **{f"B × weight, {name.removesuffix(' of S')}": (name, 2, 1) for name in THIRDS},
        "weight on one class, %": ("heavier class", 0, 100),
    },
}


def texts(frame: pd.DataFrame) -> dict[str, str]:
    cases = frame.groupby(["data", "loss", "state"], sort=False)
    found = {"alignment_findings": findings(frame)}
    for name, columns in TABLES.items():
        lines = [[", ".join(case), *report.cells(own, columns)] for case, own in cases]
        found[f"alignment_{name}"] = report.table(["", *columns], lines)
    return found


def findings(frame: pd.DataFrame) -> str:
    lines = []
    for loss, own in frame[frame["state"] != "start"].groupby("loss", sort=False):
        seen = {name: report.spread(own[name]) for name in (*CORRELATIONS, *INSIDE)}
        lines.append(
            f"- **{loss}**, trained models ({len(own)} of them): the weight's rank correlation "
            f"with the cosine is {seen['weight and cosine']}, with the loss "
            f"{seen['weight and loss']}. Inside the class that has the weight it is "
            f"{seen['weight and cosine, one class']} with the cosine and "
            f"{seen['weight and loss, one class']} with the loss.\n"
        )
    return "".join(lines)


def draw(frame: pd.DataFrame) -> None:
    """One batch of one model: who gets the weight, against loss and cosine."""
    data = split(adult(), 0, Sizes(train=frame.attrs["size"]))[0]
    with report.figure("alignment.png", 2, 2, (8.4, 6.4)) as axes:
        for row, (name, loss) in zip(axes, LOSSES.items(), strict=True):
            model = trained(data, loss, "uniform", frame.attrs["steps"], 0)
            i = next(shuffled(len(data), BATCH, 1000))
            found = weights_of(model, loss, data.x[i], data.y[i])
            for axis, key in zip(row, ("loss", "cosine"), strict=True):
                for y, (colour, marker) in enumerate([("#0072B2", "o"), ("#D55E00", "^")]):
                    of = data.y[i] == y
                    look = {"s": 16, "c": colour, "marker": marker, "label": f"class {y}"}
                    axis.scatter(found[key][of], BATCH * found["w"][of], **look)
                label = "cosine of g_i and g_S" if key == "cosine" else key
                axis.set(xlabel=f"{label} ({name})", ylabel="B × weight")
