"""Which parameters' gradients to score with: the question that the paper leaves open.

    python -m benchmarks.schemes.score_parameters train [--seeds 3] [--fast]
    python -m benchmarks.schemes.score_parameters time [--fast]

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

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.schemes.data import Split, adult, adult_tokens, batches, digits
from benchmarks.schemes.models import Transformer, cnn, evaluate, mlp, outputs_of
from benchmarks.schemes.results import mean_and_spread, save, time_ratios
from irw_optim import IRWOptimizer

ALPHA = 0.3
WAYS = ("all", "first", "middle", "last", "random third")
POINTS = ("start", "third", "end")


@dataclass(frozen=True)
class Setup:
    """A model, and what it is trained on: ``data(seed)`` gives a training and a test split."""

    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Split, Split]]
    grouping: str
    batch: int
    epochs: int
    timed_steps: int
    """Steps that are timed in one go: some tens of milliseconds."""
    compared: int
    """Batches on which scores are compared."""
    warm_up: int
    """Steps before the timed ones: past nearly all of the engine's checks."""


def layers_of(model: nn.Module) -> list[str]:
    """Names of the modules that hold parameters, in the order of the model."""
    return [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]


def chosen(way: str, layers: Sequence[str], seed: int) -> list[str] | None:
    if way == "all":
        return None
    if way == "random third":
        return random.Random(seed).sample(layers, max(1, round(len(layers) / 3)))
    return [layers[{"first": 0, "middle": len(layers) // 2, "last": -1}[way]]]


def wrapped(
    model: nn.Module, criterion: nn.Module, scores: list[str] | None, learning_rate: float = 1e-3
) -> IRWOptimizer:
    return IRWOptimizer(
        torch.optim.Adam(model.parameters(), lr=learning_rate),
        alpha=ALPHA,
        model=model,
        criterion=criterion,
        score_parameters=scores,
    )


def train(
    model: nn.Module, data: Split, optimizer: Any, criterion: nn.Module, setup: Setup, seed: int
) -> list[nn.Module]:
    """Train in place; copies of the model at the beginning, after a third and at the end."""
    total = setup.epochs * -(-len(data) // setup.batch)
    kept, step = [], 0
    for epoch in range(setup.epochs):
        for x, y in batches(data, setup.batch, seed=1000 * seed + epoch):
            if step in (0, total // 3):
                kept.append(_copy(model, setup.make))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            step += 1
    return [*kept, _copy(model, setup.make)]


def _copy(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    copied = make()
    copied.load_state_dict(model.state_dict())
    return copied


def agreement(model: nn.Module, data: Split, ways: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """Mean rank correlation and overlap with the full scores, over some batches."""
    records: dict[str, list[Any]] = {}
    for way, scores in ways.items():
        criterion = nn.CrossEntropyLoss()
        optimizer = wrapped(model, criterion, scores)
        records[way] = []
        for x, y in itertools.islice(batches(data, setup.batch, seed=7), setup.compared):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            records[way].append(optimizer.last_step)
        optimizer.detach()
    result = {}
    for way in ways:
        pairs = list(zip(records[way], records["all"], strict=True))
        result[way] = {
            "spearman": mean_and_spread(
                [float(spearmanr(a.scores, b.scores).statistic) for a, b in pairs]
            )[0],
            "overlap": mean_and_spread(
                [float(torch.minimum(a.weights, b.weights).sum()) for a, b in pairs]
            )[0],
        }
    return result


def study(name: str, setup: Setup, seeds: range) -> list[dict[str, Any]]:
    """A row for plain training and one for each way to score."""
    layers = layers_of(setup.make())
    found: dict[str, dict[str, list[float]]] = {way: {} for way in ("plain", *WAYS)}
    for seed in seeds:
        data, test = setup.data(seed)
        ways = {way: chosen(way, layers, seed) for way in WAYS}
        for way, values in found.items():
            torch.manual_seed(seed)
            model, criterion = setup.make(), nn.CrossEntropyLoss()
            optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-3)
            if way != "plain":
                optimizer = wrapped(model, criterion, ways[way])
            kept = train(model, data, optimizer, criterion, setup, seed)
            if way != "plain":
                optimizer.detach()
            metrics = evaluate(outputs_of(model, test.x), test)
            values.setdefault("accuracy", []).append(metrics["accuracy"])
            values.setdefault("worst group", []).append(metrics[f"worst {setup.grouping}"])
            if way == "all":
                for point, snapshot in zip(POINTS, kept, strict=True):
                    for other, seen in agreement(snapshot, data, ways, setup).items():
                        for key, value in seen.items():
                            found[other].setdefault(f"{key}, {point}", []).append(value)
            print(name, seed, way, {k: round(v[-1], 3) for k, v in values.items()}, flush=True)
    return [
        {"model": name, "scores from": way} | {k: mean_and_spread(v) for k, v in values.items()}
        for way, values in found.items()
    ]


def times(name: str, setup: Setup, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to score: what a step takes, in plain and in full-score steps."""
    layers = layers_of(setup.make())
    x, y = next(iter(batches(setup.data(0)[0], setup.batch, seed=0)))
    plain = setup.make()
    # Steps of length 0: a model that has learned this batch by heart is no longer a usual one.
    adam = torch.optim.Adam(plain.parameters(), lr=0.0)
    plain_steps = _steps(setup.timed_steps, plain, (x, y), nn.CrossEntropyLoss(), adam)
    actions = []
    for way in WAYS:
        model, criterion = setup.make(), nn.CrossEntropyLoss()
        optimizer = wrapped(model, criterion, chosen(way, layers, seed=0), learning_rate=0.0)
        actions.append(_steps(setup.timed_steps, model, (x, y), criterion, optimizer))
        _steps(setup.warm_up, model, (x, y), criterion, optimizer)()
    seconds, ratios = time_ratios(plain_steps, *actions, rounds=rounds)
    return [
        {
            "model": name,
            "scores from": way,
            "plain step, ms": 1000 * seconds / setup.timed_steps,
            "step / plain step": statistics.median(own),
            "step / full-score step": statistics.median(
                [a / b for a, b in zip(own, ratios[0], strict=True)]
            ),
        }
        for way, own in zip(WAYS, ratios, strict=True)
    ]


def _steps(
    number: int,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    criterion: nn.Module,
    optimizer: Any,
) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(number):
            optimizer.zero_grad()
            criterion(model(batch[0]), batch[1]).backward()
            optimizer.step()

    return steps


def setups(part: int) -> dict[str, Setup]:
    """Three models; a ``part``-th of the samples and epochs."""
    people, sequences = ((a, b[: len(b) // part]) for a, b in (adult(), adult_tokens()))
    features, tokens = people[0].x.shape[1], int(sequences[0].x.max()) + 1
    shared = {"compared": max(1, 20 // part), "warm_up": 40 // part}
    return {
        "MLP": Setup(
            make=lambda: mlp(features, 64, 64, 64, 32),
            data=lambda seed: (people[0].shuffled(seed)[: 8_000 // part], people[1]),
            grouping="label x sex",
            batch=128,
            epochs=6,
            timed_steps=max(1, 40 // part),
            **shared,
        ),
        "transformer": Setup(
            make=lambda: Transformer(tokens),
            data=lambda seed: (sequences[0].shuffled(seed)[: 8_000 // part], sequences[1]),
            grouping="label x sex",
            batch=128,
            epochs=3,
            timed_steps=max(1, 4 // part),
            **shared,
        ),
        "CNN": Setup(
            make=cnn,
            data=digits,
            grouping="inverted",
            batch=64,
            epochs=40 // part,
            timed_steps=max(1, 10 // part),
            **shared,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["train", "time"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fast", action="store_true", help="one seed or round, little data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = setups(16 if arguments.fast else 1).items()
    if arguments.part == "time":
        rounds = 1 if arguments.fast else 25
        table = [row for name, setup in cases for row in times(name, setup, rounds)]
        save("schemes_score_time", table, arguments.fast, alpha=ALPHA, rounds=rounds)
        return
    seeds = range(1 if arguments.fast else arguments.seeds)
    table = [row for name, setup in cases for row in study(name, setup, seeds)]
    save("schemes_score_parameters", table, arguments.fast, seeds=list(seeds), alpha=ALPHA)


if __name__ == "__main__":
    main()
