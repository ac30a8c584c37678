"""What α, the options and the schemes do: the numbers behind the page "Choosing".

    python -m benchmarks.schemes choosing alpha   [--data adult|law] [--flips 0.2] [--seeds 5] ...
    python -m benchmarks.schemes choosing options [--data adult|law] ...
    python -m benchmarks.schemes choosing schemes [--data adult|law] ...
    python -m benchmarks.schemes choosing held    [--data adult|law] ...

An MLP 64-32 under Adam (1e-3), 8,000 samples drawn anew for each seed, batches of 128, 8 epochs of
63 steps, the model of the last one: nothing is selected. Training sees no group. The official test
split is halved at random for each seed: one half is shown to whoever picks a decision threshold,
all numbers are of the other. "worst" is the least accuracy of a group with
50 samples or more there, "tail loss" the mean of the largest 30 % of the losses; mean and standard
deviation over the seeds. Warm-up is plain averaging for a third of the steps. Law School needs
IRW_OPTIM_DATA, a directory with law_school.csv.gz.
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.data.memory import OFFICIAL, batches, loader
from benchmarks.data.sources import Samples
from benchmarks.evidence.evaluation import evaluate
from benchmarks.models import mlp, outputs_of
from benchmarks.training import step
from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.schemes import GlobalScheme

BATCH, IRW = 128, {"alpha": 0.3}


@dataclass(frozen=True)
class Setting:
    """One way to train: options of IRWOptimizer, and of a GlobalScheme if it is a global one."""

    name: str
    options: dict[str, Any] = field(default_factory=lambda: {"alpha": 1.0, "weighting": "uniform"})
    scheme: dict[str, Any] | None = None
    warm_up: bool = False
    balanced_loss: bool = False
    moved_threshold: bool = False


PLAIN = Setting("plain")


def alphas(smallest: list[float]) -> list[Setting]:
    """IRW from far below the error rate to everybody, the smallest groups' own shares included."""
    shares = {0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, *smallest}
    return [PLAIN, *(Setting(f"IRW, alpha {a}", {"alpha": a}) for a in sorted(shares))]


def options() -> list[Setting]:
    """Each option by itself and after a warm-up, beside what needs no per-sample gradients."""
    cvar = {**IRW, "weighting": "cvar"}
    added: dict[str, dict[str, Any]] = {
        "": {},
        ", mix 0.5": {"mix": 0.5},
        ", class_balance": {"class_balance": True},
        ", center 0.5": {"center": 0.5},
        ", center 1": {"center": 1.0},
        ", center 2": {"center": 2.0},
        ", center 1, mix 0.5": {"center": 1.0, "mix": 0.5},
    }
    alone = ("", ", mix 0.5", ", class_balance", ", center 1")
    warm = [Setting(f"IRW, warm-up{n}", {**IRW, **o}, warm_up=True) for n, o in added.items()]
    return [
        PLAIN,
        Setting("plain, threshold moved", moved_threshold=True),
        Setting("plain, class-weighted loss", balanced_loss=True),
        Setting("CVaR", cvar),
        Setting("CVaR, warm-up, mix 0.5", {**cvar, "mix": 0.5}, warm_up=True),
        *(Setting(f"IRW{name}", {**IRW, **added[name]}) for name in alone),
        Setting("IRWO", {**IRW, "outliers": DBSCANFilter()}),
        *warm,
    ]


def held(use: str, steps: int, **more: Any) -> Setting:
    """A global scheme that holds its weights for some steps."""
    said = "".join(f", {k}" if v is True else f", {k} {v}" for k, v in more.items())
    scheme = {"refresh": steps, "unit": "steps", "use": use, "batch_size": 1024}
    return Setting(f"global, {use}, every {steps} steps{said}", {**IRW, **more}, scheme)


USES = ("reweighting", "resampling")


def schemes(epoch: int) -> list[Setting]:
    """The local scheme, and global ones that hold their weights for longer and longer."""
    steps = sorted({10, 30, epoch, 3 * epoch})
    return [PLAIN, Setting("local", IRW), *itertools.starmap(held, itertools.product(USES, steps))]


def held_for_an_epoch(epoch: int) -> list[Setting]:
    """Which options make up for weights that are held for long."""
    balanced, mixed = {"class_balance": True}, {"mix": 0.5}
    return [held(u, epoch, **more) for u in USES for more in (balanced, mixed, balanced | mixed)]


def train(model: nn.Module, data: Samples, setting: Setting, epochs: int, seed: int) -> list[float]:
    """Train in place; returns the share of class 1 in the weights of each renewal."""
    counts = data.y.bincount()
    weight = len(data) / (len(counts) * counts) if setting.balanced_loss else None
    criterion = nn.CrossEntropyLoss(weight=weight)
    steps = epochs * -(-len(data) // BATCH)
    optimizer = IRWOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        model=model,
        criterion=criterion,
        warmup_steps=steps // 3 if setting.warm_up else 0,
        **setting.options,
    )
    source = None
    if setting.scheme is not None:
        given = loader(data, BATCH, generator=torch.Generator().manual_seed(seed))
        source = GlobalScheme(optimizer, given, seed=seed, **setting.scheme)
    shares, seen = [], None
    for epoch in range(epochs):
        for x, y in source or batches(data, BATCH, seed=1000 * seed + epoch):
            if source is not None and source.record is not seen:
                seen = source.record
                shares.append(float(source.weights[data.y == 1].sum()))
            step(model, criterion, optimizer, x, y)
    optimizer.detach()
    return shares


def moved(outputs: Tensor, held_out: Tensor, y: Tensor) -> Tensor:
    """Outputs with the threshold at which the worst class of held-out samples fares best."""
    margins = held_out[:, 1] - held_out[:, 0]
    candidates = margins.quantile(torch.linspace(0.01, 0.99, 99))
    right = (margins > candidates[:, None]) == y.bool()
    worst = torch.stack([right[:, y == c].float().mean(1) for c in (0, 1)]).amin(0)
    return outputs - torch.stack([torch.zeros(()), candidates[worst.argmax()]])


def with_flips(data: Samples, share: float, seed: int) -> Samples:
    """Training samples of which a share has the other label, at random."""
    turned = torch.rand(len(data), generator=torch.Generator().manual_seed(seed)) < share
    return replace(data, y=torch.where(turned, 1 - data.y, data.y))


def measures(outputs: Tensor, data: Samples) -> dict[str, float]:
    with_class = replace(data, groups={**data.groups, "class": data.y})
    found = evaluate(outputs, with_class, None, smallest=50, tail=0.3)
    return {name: value for name, value in found.items() if name != "VAR"}


def run(setting: Setting, data: Samples, test: Samples, epochs: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = mlp(data.x.shape[1], 64, 32, 2)
    shares = train(model, data, setting, epochs, seed)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    shown, judged = order.tensor_split(2)
    outputs = outputs_of(model, test.x)
    if setting.moved_threshold:
        outputs = moved(outputs, outputs[shown], test.y[shown])
    row = {"setting": setting.name, "seed": seed, **measures(outputs[judged], test[judged])}
    if shares:
        row["class flips"] = sum((a > 0.5) != (b > 0.5) for a, b in itertools.pairwise(shares))
        row["heavier class"] = sum(max(s, 1 - s) for s in shares) / len(shares)
    return row


def table_of(frame: pd.DataFrame, part: str) -> str:
    names = {"setting", "seed", "accuracy", "tail loss"}
    if part != "held":  # balanced classes have no heavier one
        names |= {"class flips", "heavier class"}
    shown = [c for c in frame if c in names or c.startswith("worst ")]
    return report.markdown(report.summarised(frame[shown], ["setting"]))


def main(given: list[str]) -> None:
    chosen = report.options(
        __doc__,
        given,
        part={"choices": ["alpha", "options", "schemes", "held"]},
        data={"choices": list(OFFICIAL), "default": "adult"},
        seeds={"type": int, "default": 5},
        flips={"type": float, "default": 0.0, "help": "share of training labels turned"},
    )
    people, test = OFFICIAL[chosen.data]()
    samples, epochs, seeds = (1_000, 1, 1) if chosen.fast else (8_000, 8, chosen.seeds)
    smallest = {
        name: round(float(codes.bincount().min()) / len(codes), 3)
        for name, codes in people.groups.items()
        if name.startswith("label x")
    }
    epoch = -(-samples // BATCH)
    settings = {
        "alpha": lambda: alphas(list(smallest.values())),
        "options": options,
        "schemes": lambda: schemes(epoch),
        "held": lambda: held_for_an_epoch(epoch),
    }[chosen.part]()
    rows = []
    for seed in range(seeds):
        data = with_flips(people.shuffled(seed)[:samples], chosen.flips, seed)
        for setting in settings:
            rows.append(run(setting, data, test, epochs, seed))
            print(seed, setting.name, round(rows[-1]["accuracy"], 3), flush=True)
    flips = f"_flips_{chosen.flips}" if chosen.flips else ""
    name = f"schemes_choosing_{chosen.part}_{chosen.data}{flips}"
    settings = {"samples": samples, "epochs": epochs, "smallest_shares": smallest}
    report.save(name, rows, chosen.fast, table_of(pd.DataFrame(rows), chosen.part), **settings)
