"""Watch a training on UCI Adult: what the weights do, on whom they fall, and what is wrong.

    python examples/monitor_adult.py --save training.svg

The loop is an ordinary one; `IRWMonitor` listens to the optimizer. The groups of race and sex are
told to the monitor, for its columns by group, and to nobody else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from adult_data import load_adult
from matplotlib import rc_context
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWMonitor, IRWOptimizer


def train(class_balance: bool, epochs: int, seed: int = 0) -> IRWMonitor:
    """Train a small network on the training split; returns the monitor that listened."""
    people, _ = load_adult()
    torch.manual_seed(seed)
    codes, names = people.group_of("sex").factorize(sort=True)
    data = TensorDataset(
        torch.from_numpy(people.features),
        torch.from_numpy(people.labels),
        torch.from_numpy(codes).long(),
    )
    model = nn.Sequential(nn.Linear(people.features.shape[1], 64), nn.ReLU(), nn.Linear(64, 2))
    criterion = nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        alpha=0.3,
        model=model,
        criterion=criterion,
        class_balance=class_balance,
        warmup_steps=100,
    )
    monitor = IRWMonitor(optimizer, capacity=300)
    for _ in range(epochs):
        for x, y, code in DataLoader(data, batch_size=128, shuffle=True):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            monitor.groups(names[code.numpy()])
            optimizer.step()
    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--save", type=Path, help="the figure of the first training")
    options = parser.parse_args()
    for class_balance in (False, True):
        print(f"class_balance={class_balance}:")
        monitor = train(class_balance, options.epochs)
        for finding in monitor.diagnose():
            print(finding)
        print(f"{len(monitor)} rows, one every {monitor.interval} steps\n")
        if options.save and not class_balance:
            with rc_context({"svg.hashsalt": "monitor"}):  # the same rows give the same file
                monitor.plot().savefig(options.save, dpi=90)


if __name__ == "__main__":
    main()
