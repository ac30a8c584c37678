"""What α, the options and the schemes do: the numbers behind the page "Choosing".

    python -m benchmarks.schemes.choosing alpha   [--data adult|law] [--flips 0.2] [--seeds 5] ...
    python -m benchmarks.schemes.choosing options [--data adult|law] ...
    python -m benchmarks.schemes.choosing schemes [--data adult|law] ...
    python -m benchmarks.schemes.choosing held    [--data adult|law] ...

An MLP 64-32 under Adam (1e-3), 8,000 samples drawn anew for each seed, batches of 128, 8 epochs of
63 steps, the model of the last one: nothing is selected. Training sees no group. The official test
split is halved at random for each seed: one half is shown to whoever picks a decision threshold (or
a model: `benchmarks.schemes.selection`), all numbers are of the other. "worst" is the least
accuracy of a group with 50 samples or more there, "tail loss" the mean of the largest 30 % of the
losses; mean and standard deviation over the seeds. Warm-up is plain averaging for a third of the
steps. Law School needs IRW_OPTIM_DATA, a directory with law_school.csv.gz.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from benchmarks.schemes.data import DATA, Split, batches, loader
from benchmarks.schemes.models import evaluate, mlp, outputs_of
from benchmarks.schemes.results import mean_and_spread, save
from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.metrics import worst_cell_accuracy
from irw_optim.schemes import GlobalScheme

BATCH = 128


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
IRW = {"alpha": 0.3}


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
    return [
        PLAIN,
        Setting("plain, threshold moved", moved_threshold=True),
        Setting("plain, class-weighted loss", balanced_loss=True),
        Setting("CVaR", cvar),
        Setting("CVaR, warm-up, mix 0.5", {**cvar, "mix": 0.5}, warm_up=True),
        *(Setting(f"IRW{name}", {**IRW, **added[name]}) for name in alone),
        Setting("IRWO", {**IRW, "outliers": DBSCANFilter()}),
        *(
            Setting(f"IRW, warm-up{name}", {**IRW, **more}, warm_up=True)
            for name, more in added.items()
        ),
    ]


def schemes(steps_an_epoch: int) -> list[Setting]:
    """The local scheme, and global ones that hold their weights for longer and longer."""
    held = sorted({10, 30, steps_an_epoch, 3 * steps_an_epoch})
    return [
        PLAIN,
        Setting("local", IRW),
        *(
            Setting(
                f"global, {use}, every {steps} steps",
                IRW,
                {"refresh": steps, "unit": "steps", "use": use, "batch_size": 1024},
            )
            for use in ("reweighting", "resampling")
            for steps in held
        ),
    ]


def held_for_an_epoch(steps: int) -> list[Setting]:
    """Which options make up for weights that are held for long."""
    scheme = {"refresh": steps, "unit": "steps", "batch_size": 1024}
    more: dict[str, dict[str, Any]] = {
        "class_balance": {"class_balance": True},
        "mix 0.5": {"mix": 0.5},
        "class_balance, mix 0.5": {"class_balance": True, "mix": 0.5},
    }
    return [
        Setting(
            f"global, {use}, every {steps} steps, {name}", {**IRW, **add}, {**scheme, "use": use}
        )
        for use in ("reweighting", "resampling")
        for name, add in more.items()
    ]


def train(model: nn.Module, data: Split, setting: Setting, epochs: int, seed: int) -> list[float]:
    """Train in place; returns the share of class 1 in the weights of each renewal."""
    weight = None
    if setting.balanced_loss:
        counts = data.y.bincount()
        weight = len(data) / (len(counts) * counts)
    criterion = nn.CrossEntropyLoss(weight=weight)
    steps = epochs * -(-len(data) // BATCH)
    optimizer = IRWOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        model=model,
        criterion=criterion,
        warmup_steps=steps // 3 if setting.warm_up else 0,
        **setting.options,
    )
    shares: list[float] = []
    source: GlobalScheme | None = None
    if setting.scheme is not None:
        generator = torch.Generator().manual_seed(seed)
        given = loader(data, BATCH, generator=generator)
        source = GlobalScheme(optimizer, given, seed=seed, **setting.scheme)
    seen = None
    for epoch in range(epochs):
        epoch_batches: Iterator[Any] = (
            batches(data, BATCH, seed=1000 * seed + epoch) if source is None else iter(source)
        )
        for x, y in epoch_batches:
            if source is not None and source.record is not seen:
                seen = source.record
                shares.append(float(source.weights[data.y == 1].sum()))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    optimizer.detach()
    return shares


def moved(outputs: Tensor, held_out: Tensor, y: Tensor) -> Tensor:
    """Outputs with the threshold at which the worst class of held-out samples fares best."""
    margins = held_out[:, 1] - held_out[:, 0]
    candidates = margins.quantile(torch.linspace(0.01, 0.99, 99))
    accuracies = [
        min(float(((margins > t) == y.bool())[y == c].float().mean()) for c in (0, 1))
        for t in candidates
    ]
    best = candidates[max(range(len(accuracies)), key=accuracies.__getitem__)]
    return outputs - torch.stack([torch.zeros(()), best])


def with_flips(data: Split, share: float, seed: int) -> Split:
    """Training samples of which a share has the other label, at random."""
    turned = torch.rand(len(data), generator=torch.Generator().manual_seed(seed)) < share
    return Split(data.x, torch.where(turned, 1 - data.y, data.y), data.groups)


def run(
    setting: Setting, splits: tuple[Split, Split], clusters: Tensor, epochs: int, seed: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    data, test = splits
    model = mlp(data.x.shape[1], 64, 32)
    shares = train(model, data, setting, epochs, seed)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    held_out, judged = order.tensor_split(2)
    outputs = outputs_of(model, test.x)
    if setting.moved_threshold:
        outputs = moved(outputs, outputs[held_out], test.y[held_out])
    row: dict[str, Any] = {"setting": setting.name, "seed": seed}
    row |= evaluate(outputs[judged], test[judged])
    wrong = outputs_of(model, data.x).argmax(1) != data.y
    row["training error"] = float(wrong.double().mean())
    # What can be seen without groups, on the half that is not judged.
    visible = evaluate(outputs[held_out], test[held_out])
    cells = worst_cell_accuracy(test.y[held_out], outputs[held_out].argmax(1), clusters[held_out])
    row["visible"] = {
        "label x cluster": cells.score,
        "worst cell": cells.worst_cell,
        **{k: visible[k] for k in ("accuracy", "worst class", "mean loss", "tail loss")},
    }
    if shares:
        flips = sum((a > 0.5) != (b > 0.5) for a, b in itertools.pairwise(shares))
        row |= {"renewals": len(shares), "class flips": flips}
        row["heavier class"] = sum(max(s, 1 - s) for s in shares) / len(shares)
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    table = []
    for setting in settings:
        own = [row for row in rows if row["setting"] == setting]
        numbers = [k for k, v in own[0].items() if isinstance(v, float | int) and k != "seed"]
        table.append(
            {"setting": setting, **{k: mean_and_spread([row[k] for row in own]) for k in numbers}}
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["alpha", "options", "schemes", "held"])
    parser.add_argument("--data", choices=list(DATA), default="adult")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--flips", type=float, default=0.0, help="share of training labels turned")
    parser.add_argument("--fast", action="store_true", help="one seed, 1,000 samples, one epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_split, test = DATA[arguments.data]()
    clusters = torch.from_numpy(
        KMeans(4, n_init=10, random_state=0).fit(test.x.numpy()).labels_.astype("int64")
    )
    samples, epochs, seeds = 8_000, 8, range(arguments.seeds)
    if arguments.fast:
        samples, epochs, seeds = 1_000, 1, range(1)
    smallest = {
        name: round(float(codes.bincount().min()) / len(codes), 3)
        for name, codes in train_split.groups.items()
        if name.startswith("label x")
    }
    settings = {
        "alpha": alphas(list(smallest.values())),
        "options": options(),
        "schemes": schemes(-(-samples // BATCH)),
        "held": held_for_an_epoch(-(-samples // BATCH)),
    }[arguments.part]
    rows = []
    for seed in seeds:
        data = with_flips(train_split.shuffled(seed)[:samples], arguments.flips, seed)
        for setting in settings:
            rows.append(run(setting, (data, test), clusters, epochs, seed))
            print(seed, setting.name, round(rows[-1]["accuracy"], 3), flush=True)
    hidden = {"mean loss", "training error", "renewals"}
    if arguments.part == "held":  # balanced classes have no heavier one
        hidden |= {"class flips", "heavier class"}
    flips = f"_flips_{arguments.flips}" if arguments.flips else ""
    save(
        f"schemes_choosing_{arguments.part}_{arguments.data}{flips}",
        summary(rows),
        arguments.fast,
        shown=lambda column: column not in hidden,
        seeds=list(seeds),
        samples=samples,
        epochs=epochs,
        smallest_shares=smallest,
        rows=rows,
    )


if __name__ == "__main__":
    main()
