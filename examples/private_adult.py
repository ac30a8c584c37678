"""DP-IRW on UCI Adult: what fairness to the worst-off costs and brings under a privacy budget.

Three private trainings at the same (epsilon, delta), over several seeds:

    DP-SGD           Opacus as it is
    DP-IRW           the default of irw_optim.privacy
    threshold only   no direction: samples above the loss threshold weigh 1, all others 0.3

and plain training without privacy beside them. Two tasks: Adult as it is, and Adult with a planted
minority, 8 % of the people, marked by a feature, for whom the label means the opposite.

    python examples/private_adult.py                     # about ten minutes on one core of its own
    python examples/private_adult.py --quick             # one seed, one epoch: does it run?

Race and sex are used to evaluate, never to train. Features are scaled with statistics of the
training split, without noise: for a release, scale with public constants instead.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from adult_data import People, load_adult
from matplotlib import pyplot as plt
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from irw_optim.metrics import group_accuracy
from irw_optim.privacy import IRWDPConfig, IRWPrivacyEngine

EPSILONS = (1.0, 3.0, 8.0)
DELTA = 1e-5
BATCH_SIZE, LEARNING_RATE, MAX_GRAD_NORM = 512, 2e-3, 1.0
TAIL = 0.3  # "tail loss" is the mean of this share of the test losses, the largest
METRICS = ["accuracy", "worst group", "mean loss", "tail loss"]
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's, for any colour vision

CLASSES = 2
THRESHOLD = math.log(CLASSES)  # public: the loss of a model that knows nothing
CONFIGS: dict[str, IRWDPConfig | None] = {
    "DP-SGD": None,
    "DP-IRW": IRWDPConfig(init_threshold=THRESHOLD),
    "threshold only": IRWDPConfig(init_threshold=THRESHOLD, floor=0.3, direction_share=0.0),
}


class Rows(TensorDataset):
    """Looks up a whole batch at once, not person by person."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [tensor[indices] for tensor in self.tensors]


@dataclass(frozen=True)
class Task:
    """Training data, and test data with the groups whose worst accuracy is reported."""

    train: Rows
    x: Tensor
    y: Tensor
    groups: pd.Series[str]


def adult(train: People, test: People) -> Task:
    """Income from the census, groups race x sex."""
    groups = test.group_of("race", "sex")
    return _task(train.features, train.labels, test.features, test.labels, groups)


def planted(train: People, test: People, share: float = 0.08) -> Task:
    """The same, with a marked minority for whom the label is the other one."""
    rng = np.random.default_rng(0)

    def plant(people: People) -> tuple[Any, Any, Any]:
        marked = rng.random(len(people)) < share
        features = np.column_stack([people.features, marked]).astype(np.float32)
        return features, np.where(marked, 1 - people.labels, people.labels), marked

    x, y, _ = plant(train)
    x_test, y_test, marked = plant(test)
    return _task(x, y, x_test, y_test, pd.Series(np.where(marked, "minority", "majority")))


def _task(x: Any, y: Any, x_test: Any, y_test: Any, groups: pd.Series[str]) -> Task:
    tensor = torch.as_tensor
    return Task(Rows(tensor(x), tensor(y)), tensor(x_test), tensor(y_test), groups)


@functools.cache
def noise_for(epsilon: float, sample_rate: float, epochs: int) -> float:
    """The noise that spends `epsilon`: the same for all methods, since each is one mechanism."""
    privacy = {"target_epsilon": epsilon, "target_delta": DELTA, "accountant": "prv"}
    noise: float = get_noise_multiplier(**privacy, sample_rate=sample_rate, epochs=epochs)
    return noise


def train(task: Task, method: str, epsilon: float, seed: int, epochs: int) -> nn.Module:
    """Train one model; `epsilon` infinite is plain training without privacy."""
    torch.manual_seed(seed)
    width = task.x.shape[1]
    model: Any = nn.Sequential(
        nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)
    )
    trained = model
    criterion: Any = nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    loader: Any = DataLoader(task.train, BATCH_SIZE, shuffle=True, collate_fn=list)
    if math.isfinite(epsilon):
        config = CONFIGS[method]
        engine = PrivacyEngine() if config is None else IRWPrivacyEngine()
        returned = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            criterion=criterion,
            noise_multiplier=noise_for(epsilon, 1 / len(loader), epochs),
            max_grad_norm=MAX_GRAD_NORM,
            grad_sample_mode="ghost",
            **({} if config is None else {"irw": config}),
        )
        if config is None:  # Opacus wraps the criterion, where irw_optim follows it in place
            model, optimizer, criterion, loader = returned
        else:
            model, optimizer, loader = returned
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    if math.isfinite(epsilon):
        spent = engine.get_epsilon(DELTA)
        assert spent <= epsilon, f"spent {spent}"
    return trained.eval()


def evaluate(task: Task, model: nn.Module) -> dict[str, float]:
    """Accuracy, the worst group's, and the mean of the worst share of the losses."""
    with torch.no_grad():
        logits = model(task.x)
    losses = nn.functional.cross_entropy(logits, task.y, reduction="none")
    predicted = logits.argmax(1)
    return {
        "accuracy": 100 * float((predicted == task.y).double().mean()),
        "worst group": 100 * min(group_accuracy(task.y, predicted, task.groups).values()),
        "mean loss": losses.mean().item(),
        "tail loss": losses.topk(round(TAIL * len(losses))).values.mean().item(),
    }


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds."""
    grouped = results.groupby(["task", "epsilon", "method"], sort=False)[METRICS]
    mean, sd = grouped.mean(), grouped.std(ddof=1)
    return mean.map("{:.2f}".format) + " ± " + sd.map("{:.2f}".format)


def draw(results: pd.DataFrame, path: Path) -> None:
    """One panel a task and metric: the methods against epsilon, one sd over the seeds as bars."""
    tasks, places = results["task"].unique(), np.arange(len(EPSILONS))
    size = {"figsize": (12, 3 * len(tasks)), "squeeze": False, "sharex": True}
    figure, axes = plt.subplots(len(tasks), len(METRICS), **size)
    for axis, (task, metric) in zip(axes.flat, itertools.product(tasks, METRICS), strict=True):
        runs = results[results["task"] == task].groupby(["method", "epsilon"])[metric]
        mean, sd = runs.mean(), runs.std(ddof=1)
        for shift, colour, method in zip((-0.08, 0.0, 0.08), COLOURS, CONFIGS, strict=True):
            look = {"marker": "o", "color": colour, "capsize": 3, "label": method}
            axis.errorbar(places + shift, mean[method], sd[method], **look)
        plain = mean["not private"].item()
        axis.axhline(plain, color="grey", linestyle=":", label="not private")
        axis.set_title(f"{task}: {metric}", fontsize=9)
        axis.set_xticks(places, [f"ε = {e:g}" for e in EPSILONS])
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("private_adult"))
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    options = parser.parse_args()
    if options.quick:
        options.seeds = options.epochs = 1
    warnings.filterwarnings("ignore", message="Secure RNG turned off")  # right for an experiment
    warnings.filterwarnings("ignore", message="Optimal order is the")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")

    people = load_adult()
    tasks = {"Adult": adult(*people), "planted minority": planted(*people)}
    settings = [(m, e) for e in EPSILONS for m in CONFIGS] + [("not private", math.inf)]
    todo = list(itertools.product(tasks, range(options.seeds), settings))
    rows = []
    for name, seed, (method, epsilon) in tqdm(todo, "training"):
        model = train(tasks[name], method, epsilon, seed, options.epochs)
        row = {"task": name, "epsilon": epsilon, "method": method, "seed": seed}
        rows.append(row | evaluate(tasks[name], model))
    results = pd.DataFrame(rows)
    print(summary(results).to_string())
    options.out.mkdir(parents=True, exist_ok=True)
    results.to_csv(options.out / "runs.csv", index=False)
    draw(results, options.out / "private_adult.svg")
    print(f"every run in {options.out / 'runs.csv'}, figure beside it")


if __name__ == "__main__":
    main()
