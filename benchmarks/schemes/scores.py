"""Which parameters' gradients to score with: the question that the paper leaves open.

    python -m benchmarks.schemes scores train [--seeds 3] [--fast]
    python -m benchmarks.schemes scores time [--fast]

For an MLP and a small transformer on UCI Adult and a small CNN on scikit-learn's digits (a tenth of
them inverted), scores from all parameters against those from the first, the middle or the last
layer, or from a random third of the layers (another one for each seed):

    rank correlation   Spearman's, of the scores in a batch, and the overlap sum min(w, w') of the
                       weights, at three points of an IRW training with the full scores; mean over
                       20 batches each
    worst group        accuracy on the test split after training with these scores; mean and
                       standard deviation over the seeds, which also draw the training samples
    time               of one step, in steps with the full scores and in plain steps: CPU time of
                       one thread, in turns, median of the rounds' ratios; steps of length 0
"""

import copy
import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import report
from benchmarks.cost.steps import time_ratios
from benchmarks.data.memory import adult, adult_tokens, batches, digits
from benchmarks.data.sources import Samples
from benchmarks.evidence.evaluation import evaluate
from benchmarks.models import Transformer, mlp, outputs_of, small_cnn
from irw_optim import IRWOptimizer

ALPHA = 0.3
WAYS = ("all", "first", "middle", "last", "random third")
POINTS = ("start", "third", "end")
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """A model, and what it is trained on: ``data(seed)`` gives a training and a test split.

    Attributes:
        timed: steps that are timed in one go: some tens of milliseconds.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Samples, Samples]]
    grouping: str
    batch: int
    epochs: int
    timed: int


def chosen(way: str, model: nn.Module, seed: int) -> list[str] | None:
    """Names of the modules to score with, of those that hold parameters."""
    layers = [n for n, m in model.named_modules() if [*m.parameters(recurse=False)]]
    if way == "all":
        return None
    if way == "random third":
        return random.Random(seed).sample(layers, max(1, round(len(layers) / 3)))
    return [layers[{"first": 0, "middle": len(layers) // 2, "last": -1}[way]]]


class Training:
    """A model with its criterion and optimizer, scored ``way``, or plainly."""

    def __init__(self, model: nn.Module, way: str, seed: int, lr: float = 1e-3) -> None:
        self.model, self.criterion = model, nn.CrossEntropyLoss()
        self.optimizer: Any = torch.optim.Adam(model.parameters(), lr=lr)
        if way != "plain":
            more = {"criterion": self.criterion, "score_parameters": chosen(way, model, seed)}
            self.optimizer = IRWOptimizer(self.optimizer, alpha=ALPHA, model=model, **more)

    def gradient(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()

    def steps(self, number: int, x: Tensor, y: Tensor) -> None:
        for _ in range(number):
            self.gradient(x, y)
            self.optimizer.step()

    def detach(self) -> None:
        if isinstance(self.optimizer, IRWOptimizer):
            self.optimizer.detach()


def train(training: Training, data: Samples, setup: Setup, seed: int) -> list[dict[str, Tensor]]:
    """Train; states of the model at the beginning, after a third and at the end."""
    total = setup.epochs * -(-len(data) // setup.batch)
    epochs = (batches(data, setup.batch, seed=1000 * seed + e) for e in range(setup.epochs))
    kept = []
    for step, (x, y) in enumerate(itertools.chain.from_iterable(epochs)):
        if step in (0, total // 3):
            kept.append(copy.deepcopy(training.model.state_dict()))
        training.steps(1, x, y)
    return [*kept, copy.deepcopy(training.model.state_dict())]


def agreement(model: nn.Module, parts: Sequence[Any], seed: int) -> dict[str, dict[str, float]]:
    """Mean rank correlation and overlap with the full scores, over some batches."""
    records: dict[str, list[Any]] = {}
    for way in WAYS:
        training = Training(model, way, seed)
        records[way] = []
        for x, y in parts:
            training.gradient(x, y)
            records[way].append(training.optimizer.last_step)
        training.detach()
    found = {}
    for way, own in records.items():
        pairs = list(zip(own, records["all"], strict=True))
        ranks = [float(spearmanr(a.scores, b.scores).statistic) for a, b in pairs]
        common = [float(torch.minimum(a.weights, b.weights).sum()) for a, b in pairs]
        found[way] = {"spearman": statistics.mean(ranks), "overlap": statistics.mean(common)}
    return found


def study(name: str, setup: Setup, seed: int, compared: int) -> Iterable[Row]:
    """A row for plain training and one for each way to score."""
    data, test = setup.data(seed)
    rows: dict[str, Row] = {}
    for way in ("plain", *WAYS):
        torch.manual_seed(seed)
        training = Training(setup.make(), way, seed)
        kept = train(training, data, setup, seed)
        training.detach()
        found = evaluate(outputs_of(training.model, test.x), test, None, smallest=50)
        worst = {"accuracy": found["accuracy"], "worst group": found[f"worst {setup.grouping}"]}
        rows[way] = {"model": name, "scores from": way, "seed": seed, **worst}
        if way == "all":
            points = dict(zip(POINTS, kept, strict=True))
        print(*rows[way].values(), flush=True)
    parts = list(itertools.islice(batches(data, setup.batch, seed=7), compared))
    for point, state in points.items():
        model = setup.make()
        model.load_state_dict(state)
        for way, seen in agreement(model, parts, seed).items():
            rows[way] |= {f"{key}, {point}": value for key, value in seen.items()}
    return rows.values()


def times(name: str, setup: Setup, rounds: int, warm_up: int) -> Iterable[Row]:
    """A row for each way to score: what a step takes, in plain and in full-score steps."""
    x, y = next(iter(batches(setup.data(0)[0], setup.batch, seed=0)))
    actions = []
    for way in ("plain", *WAYS):
        # Steps of length 0: a model that has learned this batch by heart is no longer a usual one.
        training = Training(setup.make(), way, seed=0, lr=0.0)
        training.steps(warm_up, x, y)  # past nearly all of the engine's checks
        actions.append(lambda training=training: training.steps(setup.timed, x, y))
    seconds, ratios = time_ratios(*actions, rounds=rounds)
    for way, own in zip(WAYS, ratios, strict=True):
        row = {"model": name, "scores from": way, "plain step, ms": 1000 * seconds / setup.timed}
        full = statistics.median([a / b for a, b in zip(own, ratios[0], strict=True)])
        plain = statistics.median(own)
        yield row | {"step / plain step": plain, "step / full-score step": full}


def setups(part: int) -> dict[str, Setup]:
    """Three models; a ``part``-th of the samples and epochs."""
    people, sequences = ((a, b[: len(b) // part]) for a, b in (adult(), adult_tokens()))
    features, tokens = people[0].x.shape[1], int(sequences[0].x.max()) + 1

    def drawn(both: tuple[Samples, Samples]) -> Callable[[int], tuple[Samples, Samples]]:
        return lambda seed: (both[0].shuffled(seed)[: 8_000 // part], both[1])

    def network() -> nn.Module:
        return mlp(features, 64, 64, 64, 32, 2)

    def steps(number: int) -> int:
        return max(1, number // part)

    cell = "label x sex"
    return {
        "MLP": Setup(network, drawn(people), cell, 128, 6, steps(40)),
        "transformer": Setup(lambda: Transformer(tokens), drawn(sequences), cell, 128, 3, steps(4)),
        "CNN": Setup(small_cnn, digits, "inverted", 64, 40 // part, steps(10)),
    }


def main(given: list[str]) -> None:
    seeds = {"type": int, "default": 3}
    options = report.options(__doc__, given, part={"choices": ["train", "time"]}, seeds=seeds)
    part = 16 if options.fast else 1
    cases = setups(part).items()
    if options.part == "time":
        rounds = 1 if options.fast else 25
        table = [row for name, setup in cases for row in times(name, setup, rounds, 40 // part)]
        report.save("schemes_score_time", table, options.fast, alpha=ALPHA, rounds=rounds)
        return
    number = 1 if options.fast else options.seeds
    compared = max(1, 20 // part)
    rows = [r for n, s in cases for seed in range(number) for r in study(n, s, seed, compared)]
    table = report.summarised(pd.DataFrame(rows), ["model", "scores from"])
    report.save("schemes_score_parameters", table, options.fast, seeds=number, alpha=ALPHA)
