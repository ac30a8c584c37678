"""Which parameters' gradients to score with: the question that the paper leaves open.

    python -m benchmarks.schemes.score_parameters [--fast]

For an MLP and a small transformer on UCI Adult and a small CNN on scikit-learn's digits (a tenth of
them inverted), scores from all parameters against those from the first, the middle or the last
layer, or from a random third of the layers:

    rank correlation   Spearman's, of the scores in a batch, and the overlap sum min(w, w') of the
                       weights, at three points of an IRW training; mean over 20 batches each
    worst group        accuracy on the test split after training with these scores
    time               of one step, in steps with the full scores and in plain steps
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.schemes.shared import (
    Split,
    Transformer,
    adult,
    adult_tokens,
    batches,
    cnn,
    digits,
    evaluate,
    mean_and_spread,
    mlp,
    outputs_of,
    save,
    seconds,
)
from irw_optim import IRWOptimizer

ALPHA = 0.3
WAYS = ("all", "first", "middle", "last", "random third")


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
    model: nn.Module, criterion: nn.Module, scores: list[str] | None, learning_rate: float
) -> IRWOptimizer:
    return IRWOptimizer(
        torch.optim.Adam(model.parameters(), lr=learning_rate),
        alpha=ALPHA,
        model=model,
        criterion=criterion,
        score_parameters=scores,
    )


def train(
    model: nn.Module, data: Split, scores: list[str] | None, setup: dict[str, Any], seed: int
) -> list[nn.Module]:
    """Train in place; copies of the model at the beginning, after a third and at the end."""
    criterion = nn.CrossEntropyLoss()
    optimizer = wrapped(model, criterion, scores, setup["lr"])
    total = setup["epochs"] * -(-len(data) // setup["batch"])
    kept, step = [], 0
    for epoch in range(setup["epochs"]):
        for x, y in batches(data, setup["batch"], seed=1000 * seed + epoch):
            if step in (0, total // 3):
                kept.append(_copy(model, setup["make"]))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            step += 1
    optimizer.detach()
    return [*kept, _copy(model, setup["make"])]


def _copy(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    copied = make()
    copied.load_state_dict(model.state_dict())
    return copied


def agreement(model: nn.Module, data: Split, ways: dict[str, Any], batch: int) -> dict[str, Any]:
    """Mean rank correlation and overlap with the full scores, over 20 batches."""
    records: dict[str, list[Any]] = {}
    for way, scores in ways.items():
        criterion = nn.CrossEntropyLoss()
        optimizer = wrapped(model, criterion, scores, 0.0)
        records[way] = []
        for x, y in itertools.islice(batches(data, batch, seed=7), 20):
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


def step_times(
    make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], ways: dict[str, Any], rounds: int
) -> dict[str, float]:
    """Seconds of a step with each way's scores, and of a plain one."""

    def stepper(scores: Any, plain: bool = False) -> Callable[[], None]:
        model, criterion = make(), nn.CrossEntropyLoss()
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-4)
        if not plain:
            optimizer = wrapped(model, criterion, scores, 1e-4)

        def steps() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                criterion(model(batch[0]), batch[1]).backward()
                optimizer.step()

        return steps

    actions = [stepper(None, plain=True), *(stepper(scores) for scores in ways.values())]
    for action in actions:  # past the first checks of the engine
        for _ in range(4):
            action()
    return dict(zip(["plain", *ways], seconds(*actions, rounds=rounds), strict=True))


def study(name: str, setup: dict[str, Any], seeds: range, rounds: int) -> list[dict[str, Any]]:
    data, test = setup["data"]
    layers = layers_of(setup["make"]())
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for seed in seeds:
        ways = {way: chosen(way, layers, seed) for way in WAYS}
        for way, scores in [("plain", None), *ways.items()]:
            torch.manual_seed(seed)
            model = setup["make"]()
            if way == "plain":
                kept = train_plainly(model, data, setup, seed)
            else:
                kept = train(model, data, scores, setup, seed)
            metrics = evaluate(outputs_of(model, test.x), test)
            store = found.setdefault(way, {})
            metrics["worst group"] = metrics[f"worst {setup['grouping']}"]
            for key in ("accuracy", "worst group", "tail loss"):
                store.setdefault(key, []).append(metrics[key])
            if way == "all":
                for point, snapshot in zip(("start", "third", "end"), kept, strict=True):
                    for other, values in agreement(snapshot, data, ways, setup["batch"]).items():
                        for key, value in values.items():
                            found[other].setdefault(f"{key}, {point}", []).append(value)
            print(name, seed, way, {k: round(v[-1], 3) for k, v in store.items()}, flush=True)
    x, y = next(iter(batches(data, setup["batch"], seed=0)))
    times = step_times(setup["make"], (x, y), {way: chosen(way, layers, 0) for way in WAYS}, rounds)
    rows = []
    for way, values in found.items():
        row: dict[str, Any] = {"model": name, "scores from": way}
        row |= {key: mean_and_spread(v) for key, v in values.items()}
        row["step / full-score step"] = times[way] / times["all"]
        row["step / plain step"] = times[way] / times["plain"]
        rows.append(row)
    return rows


def train_plainly(
    model: nn.Module, data: Split, setup: dict[str, Any], seed: int
) -> list[nn.Module]:
    optimizer = torch.optim.Adam(model.parameters(), lr=setup["lr"])
    for epoch in range(setup["epochs"]):
        for x, y in batches(data, setup["batch"], seed=1000 * seed + epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="one seed, an eighth of the data")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, rounds = (range(1), 3) if arguments.fast else (range(arguments.seeds), 15)

    people, sequences = adult(), adult_tokens()
    part = 8 if arguments.fast else 1
    features, tokens = people[0].x.shape[1], int(sequences[0].x.max()) + 1
    setups = {
        "MLP": {
            "make": lambda: mlp(features, 64, 64, 64, 32),
            "data": (people[0][: len(people[0]) // part], people[1]),
            "grouping": "label x sex",
            "batch": 128,
            "epochs": 4,
            "lr": 1e-3,
        },
        "transformer": {
            "make": lambda: Transformer(tokens),
            "data": (sequences[0].shuffled(0)[: 12_000 // part], sequences[1]),
            "grouping": "label x sex",
            "batch": 128,
            "epochs": 3,
            "lr": 1e-3,
        },
        "CNN": {
            "make": cnn,
            "data": digits(),
            "grouping": "inverted",
            "batch": 64,
            "epochs": 16 // part,
            "lr": 1e-3,
        },
    }
    table = []
    for name, setup in setups.items():
        table += study(name, setup, seeds, rounds)
    save("schemes_score_parameters", table, arguments.fast, seeds=list(seeds), alpha=ALPHA)


if __name__ == "__main__":
    main()
