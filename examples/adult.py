"""Six ways to weigh the samples of UCI Adult, one untouched training loop: `make demo`.

Trains a small network to predict whether a person earns more than 50,000 dollars a year, from
features without race and sex, and looks at what each weighting did to the people of each group.
Prints a table and what may be concluded from it, and writes both with figures to an HTML file.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from adult_data import People, load_adult
from adult_report.diary import Diary
from adult_report.evaluation import evaluate, moved_threshold, per_sample_losses
from adult_report.findings import findings
from adult_report.page import write_report
from adult_report.runs import MOVED, PLAIN, Run, Runs
from adult_report.terminal import print_findings, print_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import irw_optim
from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.metrics import worst_alpha_loss

BATCH_SIZE = 256
REPORT = Path(__file__).parents[1] / "build" / "adult-report.html"
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TimeElapsedColumn(),
    TextColumn("left:"),
    TimeRemainingColumn(),
)
INNER: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "sgd": (torch.optim.SGD, 0.1),
    "adam": (torch.optim.Adam, 0.001),
}


def methods(steps: int) -> dict[str, dict[str, Any]]:
    """What is compared: the arguments of `IRWOptimizer` that make each method."""
    return {
        PLAIN: {"weighting": "uniform"},
        "class-balanced": {"weighting": "uniform", "class_balance": True},
        "CVaR": {"weighting": "cvar"},
        "IRW": {},
        "IRW, centred": {"center": 1.0, "warmup_steps": steps // 3},
        "IRWO": {"outliers": DBSCANFilter()},
    }


def network(features: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


def train(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: IRWOptimizer,
    people: People,
    epochs: int,
    diary: Diary,
) -> Iterator[int]:
    """An ordinary training loop: nothing in it depends on the method.

    Yields:
        The number of each epoch when it is over.
    """
    x, y = torch.from_numpy(people.features), torch.from_numpy(people.labels)
    scheduler = CosineAnnealingLR(optimizer, epochs * steps_per_epoch(people))
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(people)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = criterion(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            scheduler.step()
            diary.note(optimizer.last_step, batch)  # for the report
        yield epoch


def predict(model: nn.Module, people: People) -> Tensor:
    """The logits of everybody, of shape (N, 2)."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(torch.from_numpy(people.features))
    return logits


def steps_per_epoch(people: People) -> int:
    """How many batches, the last and shorter one included."""
    return math.ceil(len(people) / BATCH_SIZE)


def run_all(options: argparse.Namespace, progress: Progress) -> Runs:
    """Every method with every seed; the methods share a seed's initialisation and batches."""
    people, test = load_adult()
    compared = methods(options.epochs * steps_per_epoch(people))
    task = progress.add_task("", total=options.seeds * len(compared) * options.epochs)
    inner, rate = INNER[options.optimizer]
    runs = []
    for seed, (method, arguments) in product(range(options.seeds), compared.items()):
        progress.update(task, description=f"seed {seed + 1} of {options.seeds}, {method}")
        torch.manual_seed(seed)
        model, criterion = network(people.features.shape[1]), nn.CrossEntropyLoss()
        optimizer = IRWOptimizer(
            inner(model.parameters(), lr=rate),
            alpha=options.alpha,
            model=model,
            criterion=criterion,
            **arguments,
        )
        diary = Diary(people.labels)
        started = time.process_time()
        for _ in train(model, criterion, optimizer, people, options.epochs, diary):
            losses = per_sample_losses(predict(model, test), test)
            diary.close_epoch(worst_alpha_loss(losses, options.alpha))
            progress.advance(task)
        seconds = time.process_time() - started
        logits = predict(model, test)
        runs.append(Run(method, seed, evaluate(logits, test, options.alpha), diary, seconds))
        if method == PLAIN:
            moved = evaluate(moved_threshold(logits, people.labels), test, options.alpha)
            runs.append(Run(MOVED, seed, moved))
        if not progress.console.is_terminal:  # where no bar is seen to move
            progress.console.print(f"seed {seed + 1} of {options.seeds}, {method}: trained")
    return Runs(runs, people, test, options.alpha)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seeds", type=whole, default=5, help="how many (%(default)s)")
    parser.add_argument("--epochs", type=whole, default=12, help="of each training (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.3, help="share in (0, 1] (%(default)s)")
    parser.add_argument("--optimizer", choices=INNER, default="sgd", help="inner (%(default)s)")
    parser.add_argument("--output", type=Path, default=REPORT, help="HTML file (%(default)s)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    console = Console()
    with Progress(*COLUMNS, console=console) as progress:
        runs = run_all(options, progress)
    conclusions = findings(runs)
    print_table(console, runs)
    print_findings(console, conclusions)
    write_report(options.output, runs, conclusions, settings(options))
    console.print(f"\nThe report, with figures, is in {options.output.resolve()}", soft_wrap=True)


def whole(text: str) -> int:
    """A number of seeds or epochs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def settings(options: argparse.Namespace) -> dict[str, str]:
    """What a reader must know to repeat the run."""
    rate = INNER[options.optimizer][1]
    return {
        "command": f"python examples/adult.py --seeds {options.seeds} --epochs {options.epochs} "
        f"--alpha {options.alpha:g} --optimizer {options.optimizer}",
        "training": f"{options.epochs} epochs of batches of {BATCH_SIZE}, "
        f"{options.optimizer.upper()} with a learning rate of {rate} and cosine decay; the last "
        "epoch counts, nothing is selected",
        "network": "two hidden layers of 64 and 32 units, ReLU",
        "software": f"irw-optim {irw_optim.__version__}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    main()
