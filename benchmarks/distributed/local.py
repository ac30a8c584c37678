"""What `worst_off="local"` changes: S in each process's shard against S in the whole batch.

    python -m benchmarks.distributed.local [--fast | --check]

UCI Adult, an MLP under SGD with cosine decay, batches of 256. A shard that its process weighs by
itself is a backward pass of its own, and DistributedDataParallel averages the gradients; so R
processes are R passes with a factor of 1/R each, in one process. `--check` runs two real processes
(gloo) and compares. The shards are drawn at random, or each process reads its piece of a data set
sorted by label.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.fairness.analysis import estimate
from benchmarks.schemes.data import Split, adult
from benchmarks.schemes.results import save
from irw_optim import IRWOptimizer
from irw_optim.metrics import worst_alpha_loss, worst_group_accuracy

ALPHA, BATCH_SIZE, LEARNING_RATE = 0.3, 256, 0.1
RANKS = (2, 4, 8)
COMPARE_EVERY = 16


def network(features: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 2))


def shards(data: Split, ranks: int, by_label: bool, seed: int) -> Iterator[list[Tensor]]:
    """One epoch: for every batch, the samples of each process."""
    draw = torch.Generator().manual_seed(seed)
    size = len(data) // ranks
    if by_label:
        pieces = data.y.argsort(stable=True)[: size * ranks].split(size)
        orders = [piece[torch.randperm(size, generator=draw)] for piece in pieces]
    else:
        orders = list(torch.randperm(len(data), generator=draw)[: size * ranks].split(size))
    yield from (
        list(parts) for parts in zip(*(o.split(BATCH_SIZE // ranks) for o in orders), strict=True)
    )


class Training:
    """A model that is trained with S in the shards, or in the batch, and may compare the two."""

    def __init__(self, data: Split, seed: int) -> None:
        self.data = data
        self.model, self.criterion = network(data.x.shape[1], seed), nn.CrossEntropyLoss()
        self.optimizer = IRWOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE),
            alpha=ALPHA,
            model=self.model,
            criterion=self.criterion,
        )

    def gradient(self, passes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weigh each pass by itself, and average: S and the weights of all samples, sum 1."""
        self.optimizer.zero_grad()
        members, weights = [], []
        for samples in passes:
            loss = self.criterion(self.model(self.data.x[samples]), self.data.y[samples])
            (loss / len(passes)).backward()
            record = self.optimizer.last_step
            assert record is not None
            members.append(record.worst_off)
            weights.append(record.weights / len(passes))
        return torch.cat(members), torch.cat(weights)

    def agreement(self, passes: Sequence[Tensor]) -> tuple[float, float]:
        """Share of the weight, and of S, that both ways give to the same samples."""
        members, weights = self.gradient([torch.cat(list(passes))])
        other_members, other_weights = self.gradient(passes)
        common = float((members & other_members).sum() / members.sum())
        return float(torch.minimum(weights, other_weights).sum()), common


def run(
    train: Split, test: Split, ranks: int, by_label: bool, seed: int, epochs: int
) -> dict[str, float]:
    training = Training(train, seed)
    total = epochs * (len(train) // ranks // (BATCH_SIZE // ranks) + 1)
    decay = CosineAnnealingLR(training.optimizer, total)
    compared = []
    steps = 0
    for epoch in range(epochs):
        for passes in shards(train, ranks, by_label, seed + 1000 * epoch):
            if ranks > 1 and steps % COMPARE_EVERY == 0:
                compared.append(training.agreement(passes))
            training.gradient(passes)
            training.optimizer.step()
            decay.step()
            steps += 1
    with torch.no_grad():
        logits = training.model(test.x)
    losses = nn.functional.cross_entropy(logits, test.y, reduction="none")
    predicted, cells = logits.argmax(1), test.groups["label x sex"]
    weight, members = (torch.tensor(compared).mean(0) if compared else torch.ones(2)).tolist()
    return {
        "accuracy": float((predicted == test.y).float().mean()),
        "worst label x sex": worst_group_accuracy(test.y, predicted, cells),
        "tail loss": worst_alpha_loss(losses, ALPHA),
        "weight in common": weight,
        "S in common": members,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval."""
    found = estimate(np.array(values))
    return found.mean, found.half


def table(seeds: int, epochs: int) -> list[dict[str, Any]]:
    train, test = adult()
    settings = [(1, False)] + [(r, by_label) for by_label in (False, True) for r in RANKS]
    rows, whole = [], []
    for ranks, by_label in settings:
        runs = [run(train, test, ranks, by_label, seed, epochs) for seed in range(seeds)]
        whole = whole or runs
        name = "global" if ranks == 1 else f"local, {ranks} processes"
        row: dict[str, Any] = {"S": name, "shards": "by label" if by_label else "at random"}
        row |= {metric: interval([r[metric] for r in runs]) for metric in runs[0]}
        worst = [
            r["worst label x sex"] - w["worst label x sex"]
            for r, w in zip(runs, whole, strict=True)
        ]
        row["worst, less global's"] = None if ranks == 1 else interval(worst)
        print(row, flush=True)
        rows.append(row)
    return rows


# Two real processes -----------------------------------------------------------------------------


def check(steps: int = 20) -> float:
    """The largest difference between two processes' parameters and one's two passes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, steps), nprocs=2)
        apart = [torch.load(f"{folder}/{rank}") for rank in range(2)]
    train, _ = adult()
    training = Training(train, seed=0)
    for passes in islice(shards(train, 2, False, seed=0), steps):
        training.gradient(passes)
        training.optimizer.step()
    together = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    assert torch.equal(*apart), "the processes' parameters differ"
    return float((apart[0] - together).abs().max())


def _process(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    train, _ = adult()
    model, criterion = network(train.x.shape[1], seed=0), nn.CrossEntropyLoss()
    called = DistributedDataParallel(model)
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        alpha=ALPHA,
        model=called,
        criterion=criterion,
        worst_off="local",
    )
    for passes in islice(shards(train, 2, False, seed=0), steps):
        optimizer.zero_grad()
        criterion(called(train.x[passes[rank]]), train.y[passes[rank]]).backward()
        optimizer.step()
    torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), f"{folder}/{rank}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a table in seconds, nothing stored")
    parser.add_argument("--check", action="store_true", help="against two real processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        print(f"largest difference of a parameter after 20 steps: {check():.1e}")
        return
    seeds, epochs = (1, 1) if options.fast else (5, 3)
    save("distributed_local", table(seeds, epochs), options.fast, epochs=epochs, seeds=seeds)


if __name__ == "__main__":
    main()
