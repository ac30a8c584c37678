"""Train plainly, see who suffers, look at whom the weights would favour, and decide.

    python examples/find_who_suffers.py                  # about a minute on one core
    python examples/find_who_suffers.py --save who.png   # and a picture

Four questions about a model that says who earns more than 50,000 dollars a year (UCI Adult), in the
order in which they come up in practice:

    1. Who suffers under plain training?   accuracy by group
    2. Whom would the weights favour?      a rehearsal: IRW with a learning rate of 0
    3. Does training with them go well?    IRWMonitor.diagnose()
    4. Is it worth it?                     compare_remedies(...), the cheap ones among them

The groups are income × sex, and questions 1 and 2 are for somebody who knows them. No training ever
sees them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from adult_data import People, load_adult
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from irw_optim import IRWMonitor, IRWOptimizer, compare_remedies
from irw_optim.metrics import group_accuracy

ALPHA, BATCH_SIZE = 0.3, 256
GROUPS = ("income", "sex")
SHARES = {"people": "samples", "worst off": "worst_off", "weight": "weight"}
SGD = partial(torch.optim.SGD, lr=0.1)


def network(people: People) -> nn.Module:
    return nn.Sequential(nn.Linear(people.features.shape[1], 64), nn.ReLU(), nn.Linear(64, 2))


def batches(people: People) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """One epoch of features, labels and groups."""
    x, y = torch.from_numpy(people.features), torch.from_numpy(people.labels)
    groups = people.group_of(*GROUPS).to_numpy()
    for batch in torch.randperm(len(people)).split(BATCH_SIZE):
        yield x[batch], y[batch], groups[batch.numpy()]


def train(people: People, epochs: int, irw: bool) -> tuple[nn.Module, IRWMonitor | None]:
    """An ordinary loop: plainly, or wrapped and watched."""
    torch.manual_seed(0)
    model, criterion = network(people), nn.CrossEntropyLoss()
    optimizer: Any = SGD(model.parameters())
    monitor = None
    if irw:
        optimizer = IRWOptimizer(optimizer, alpha=ALPHA, model=model, criterion=criterion)
        monitor = IRWMonitor(optimizer)
    scheduler = CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for x, y, _ in batches(people):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    return model, monitor


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--people", type=int, help="train on that many of them only")
    parser.add_argument("--save", type=Path, help="a picture of the last answer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    everybody, _ = load_adult()
    people, validation = everybody.hold_out(0.2)
    people = people.part(range(options.people or len(people)))

    print("1. Who suffers under plain training? Accuracy in %")
    plain, _ = train(people, options.epochs, irw=False)
    decided = plain(torch.from_numpy(validation.features)).argmax(1)
    suffering = group_accuracy(validation.labels, decided, validation.group_of(*GROUPS))
    print((100 * pd.Series(suffering)).round(1).to_string(), "\n")

    print("2. Whom would the weights favour? Shares in %")
    print(rehearse(plain, people).round(1).to_string(), "\n")

    print("3. Does training with them go well?")
    for finding in train(people, options.epochs, irw=True)[1].diagnose():
        print(finding)

    print("\n4. Is it worth it? On held-out people, in %, mean over the seeds:\n")
    result = compare_remedies(
        lambda: network(people),
        nn.CrossEntropyLoss(),
        (people.features, people.labels),
        (validation.features, validation.labels),
        groups=validation.groups[list(GROUPS)],
        seeds=options.seeds,
        epochs=options.epochs,
        batch_size=BATCH_SIZE,
        optimizer=SGD,
        alpha=ALPHA,
    )
    print(result)
    print("\nAnd the groups of race × sex, in %, without those of fewer than 100 people:\n")
    others = result.by_group(validation.groups[["race", "sex"]]).query("people >= 100")
    print((100 * others[["plain", result.take]]).round(1).to_string())
    if options.save:
        result.figure().savefig(options.save, dpi=100)


if __name__ == "__main__":
    main()
