"""Train plainly, see who suffers, look at whom the weights would favour, and decide.

    python examples/find_who_suffers.py                  # about a minute on one core
    python examples/find_who_suffers.py --save who.png   # and a picture

Four questions about a model that says who earns more than 50,000 dollars a year (UCI Adult), in the
order in which they come up in practice:

    1. Who suffers under plain training?   accuracy by group
    2. Whom would the weights favour?      a rehearsal: IRW with a learning rate of 0
    3. Does training with them go well?    IRWMonitor.diagnose()
    4. Is it worth it?                     against the cheapest remedy, at the same price

The groups are income × sex, and questions 1 and 2 are for somebody who knows them. No training ever
sees them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from adult_data import People, load_adult
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from irw_optim import IRWMonitor, IRWOptimizer
from irw_optim.metrics import group_accuracy, worst_alpha_loss, worst_cluster_accuracy

ALPHA, BATCH_SIZE, LEARNING_RATE = 0.3, 256, 0.1
GROUPS = ("income", "sex")
SHARES = {"people": "samples", "worst off": "worst_off", "weight": "weight"}


# Training: an ordinary loop ---------------------------------------------------------------------


def network(people: People) -> nn.Module:
    return nn.Sequential(nn.Linear(people.features.shape[1], 64), nn.ReLU(), nn.Linear(64, 2))


def batches(people: People) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """One epoch of features, labels and groups."""
    x, y = torch.from_numpy(people.features), torch.from_numpy(people.labels)
    groups = people.group_of(*GROUPS).to_numpy()
    for batch in torch.randperm(len(people)).split(BATCH_SIZE):
        yield x[batch], y[batch], groups[batch.numpy()]


def train(
    people: People, epochs: int, seed: int, irw: dict[str, Any] | None = None
) -> tuple[nn.Module, IRWMonitor | None]:
    """Train plainly, or, with options for `IRWOptimizer`, wrapped and watched."""
    torch.manual_seed(seed)
    model, criterion = network(people), nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    monitor = None
    if irw is not None:
        optimizer = IRWOptimizer(optimizer, alpha=ALPHA, model=model, criterion=criterion, **irw)
        monitor = IRWMonitor(optimizer)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y, _ in batches(people):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    return model, monitor


# Question 1: accuracy by group ------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, people: People) -> Tensor:
    logits: Tensor = model(torch.from_numpy(people.features))
    return logits


def accuracies(logits: Tensor, people: People, *columns: str) -> pd.Series[float]:
    """In %, of every group that the columns make."""
    return 100 * pd.Series(
        group_accuracy(people.labels, logits.argmax(1), people.group_of(*columns))
    )


# Question 2: the rehearsal ----------------------------------------------------------------------


def rehearse(model: nn.Module, people: People) -> pd.DataFrame:
    """An epoch at a learning rate of 0: IRW weighs every batch, and nothing changes.

    The monitor is told the groups, for its columns by group; the optimizer is not.
    """
    criterion = nn.CrossEntropyLoss()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = IRWOptimizer(still, alpha=ALPHA, model=model, criterion=criterion)
    monitor = IRWMonitor(optimizer)
    for x, y, groups in batches(people):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        monitor.groups(groups)
        optimizer.step()
    optimizer.detach()

    mean = 100 * monitor.frame().fillna(0.0).mean()
    groups = sorted(set(people.group_of(*GROUPS)))
    shares = {
        name: pd.Series({g: mean[f"{column}/group_{g}"] for g in groups})
        for name, column in SHARES.items()
    }
    return pd.DataFrame(shares)


# Question 4: what it brings, and what something simpler brings ----------------------------------


def methods(steps: int) -> dict[str, dict[str, Any] | None]:
    """Plain training, the paper, the advice to question 3, and the centred variant."""
    return {
        "plain": None,
        "IRW": {},
        "IRW, balanced": {"class_balance": True},
        "IRW, centred": {"center": 1.0, "warmup_steps": steps // 3},
    }


def by_threshold(logits: Tensor, people: People) -> pd.DataFrame:
    """Plain training with the decision threshold moved, from not at all to far.

    It is the cheapest remedy: one number, no training. And it has every price, so what it brings
    at the price of IRW is what IRW has to beat.
    """
    margins, rich = (logits[:, 1] - logits[:, 0]).numpy(), people.labels == 1
    groups = people.group_of(*GROUPS).astype("category")
    rows = []
    for shift in np.linspace(0.0, 2.0, 101):
        right = pd.Series(100.0 * ((margins + shift > 0) == rich))
        rows.append((right.mean(), right.groupby(groups, observed=True).mean().min()))
    return pd.DataFrame(rows, columns=["accuracy", "worst group"])


def accuracy(logits: Tensor, people: People) -> float:
    """In %, of everybody."""
    return 100 * float((logits.argmax(1).numpy() == people.labels).mean())


def judge(
    model: nn.Module, validation: People, test: People, curve: pd.DataFrame
) -> dict[str, float]:
    """The last entry is for those who know no groups: what to choose a model by."""
    logits = predict(model, test)
    losses = nn.functional.cross_entropy(logits, torch.tensor(test.labels), reduction="none")
    price = accuracy(logits, test)
    affordable = curve["accuracy"] >= min(price, curve["accuracy"].max())
    clusters = worst_cluster_accuracy(
        validation.features, validation.labels, predict(model, validation).argmax(1)
    )
    return {
        "accuracy": price,
        "worst group": accuracies(logits, test, *GROUPS).min(),
        "threshold's": curve["worst group"][affordable].max(),
        "race × sex": accuracies(logits, test, "race", "sex").min(),
        "tail loss": worst_alpha_loss(losses, ALPHA),
        "clusters": 100 * clusters.score,
    }


def mean_and_spread(judged: Any) -> pd.DataFrame:
    """As text; losses with one digit more than percentages."""
    mean, sd = judged.mean(), judged.std(ddof=0)
    return pd.DataFrame(
        {
            name: [
                f"{m:.{digits}f} ± {s:.{digits}f}"
                for m, s in zip(mean[name], sd[name], strict=True)
            ]
            for name in mean
            for digits in [2 if "loss" in name else 1]
        },
        index=list(mean.index),
    )


def decision(judged: pd.DataFrame) -> str:
    """What somebody without groups would choose, and what those with groups know about it."""
    chosen = judged["clusters"].idxmax()
    gained = judged.loc[chosen] - judged.loc["plain"]
    ahead = judged.loc[chosen, "worst group"] - judged.loc[chosen, "threshold's"]
    return (
        f"The score by clusters picks: {chosen}. In points, against plain training: "
        f"{gained['worst group']:+.1f} for the worst group, {gained['accuracy']:+.1f} of accuracy, "
        f"{gained['race × sex']:+.1f} for the worst group of race × sex.\n"
        f"Against a threshold moved to the same accuracy: {ahead:+.1f} for the worst group."
    )


# The four answers -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--people", type=int, help="train on that many of them only")
    parser.add_argument("--save", type=Path, help="a picture of the answers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    everybody, test = load_adult()
    people, validation = everybody.hold_out(0.2)
    people = people.part(range(options.people or len(people)))

    print("1. Who suffers under plain training? Accuracy in %")
    plain, _ = train(people, options.epochs, seed=0)
    suffering = accuracies(predict(plain, validation), validation, *GROUPS)
    print(suffering.round(1).to_string(), "\n")

    print("2. Whom would the weights favour? Shares in %")
    shares = rehearse(plain, people)
    print(shares.round(1).to_string(), "\n")

    print("3. Does training with them go well?")
    for finding in train(people, options.epochs, seed=0, irw={})[1].diagnose():
        print(finding)

    print("\n4. Is it worth it? On the test split, in %, mean ± sd over the seeds:")
    print("   threshold's = the worst group by plain training's threshold at the same accuracy")
    rows = []
    for seed in range(options.seeds):
        for name, irw in methods(options.epochs * -(-len(people) // BATCH_SIZE)).items():
            model, _ = train(people, options.epochs, seed, irw)
            if irw is None:
                curve = by_threshold(predict(model, test), test)
            rows.append({"method": name, **judge(model, validation, test, curve)})
    judged = pd.DataFrame(rows).groupby("method", sort=False)
    print(mean_and_spread(judged).to_string())
    print("\n" + decision(judged.mean()))

    if options.save:
        draw(suffering, shares, judged.mean(), curve).savefig(options.save, dpi=100)


def draw(
    suffering: pd.Series[float], shares: pd.DataFrame, judged: pd.DataFrame, curve: pd.DataFrame
) -> Any:
    """The answers 1, 2 and 4; the curve is the last seed's."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    suffering.plot.barh(ax=left, color="tab:gray", title="1. Plain training: accuracy, %")
    shares.plot.barh(ax=middle, title="2. Rehearsal: shares, %").set_yticklabels([])
    right.plot(curve["accuracy"], curve["worst group"], color="tab:gray", label="moved threshold")
    for name, row in judged.iterrows():
        right.plot(row["accuracy"], row["worst group"], "o", label=name)
    right.set(title="4. The worst group against everybody", xlabel="accuracy, %")
    right.set_ylabel("accuracy of the worst group, %")
    right.legend()
    return figure


if __name__ == "__main__":
    main()
