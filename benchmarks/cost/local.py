"""What `worst_off="local"` changes: S in each process's shard against S in the whole batch.

UCI Adult, an MLP under SGD with cosine decay, batches of 256. A shard that its process weighs by
itself is a backward pass of its own, and DistributedDataParallel averages the gradients; so R
processes are R passes with a factor of 1/R each, in one process. `--check` runs two real processes
(gloo) and compares. The shards are drawn at random, or each process reads its piece of a data set
sorted by label.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks import report
from benchmarks.cost.traffic import in_two_processes
from benchmarks.data.memory import adult
from benchmarks.data.sources import Samples
from benchmarks.evidence.evaluation import evaluate
from benchmarks.models import mlp, outputs_of
from irw_optim import IRWOptimizer

ALPHA, BATCH_SIZE, RANKS, COMPARE_EVERY = 0.3, 256, (2, 4, 8), 16


def shards(data: Samples, ranks: int, by_label: bool, seed: int) -> Iterator[list[Tensor]]:
    """One epoch: for every batch, the samples of each process."""
    draw = torch.Generator().manual_seed(seed)
    size = len(data) // ranks
    if by_label:
        pieces = data.y.argsort(stable=True)[: size * ranks].split(size)
        orders = [piece[torch.randperm(size, generator=draw)] for piece in pieces]
    else:
        orders = list(torch.randperm(len(data), generator=draw)[: size * ranks].split(size))
    yield from map(list, zip(*(o.split(BATCH_SIZE // ranks) for o in orders), strict=True))


class Training:
    """A model that is trained with S in the shards, or in the batch, and may compare the two."""

    def __init__(self, data: Samples, seed: int, called: Any = lambda m: m, **more: Any) -> None:
        torch.manual_seed(seed)
        self.data, self.criterion = data, nn.CrossEntropyLoss()
        self.model = called(mlp(data.x.shape[1], 64, 2))
        inner = torch.optim.SGD(self.model.parameters(), lr=0.1)
        attached = {"model": self.model, "criterion": self.criterion}
        self.optimizer = IRWOptimizer(inner, alpha=ALPHA, **attached, **more)

    def gradient(self, passes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weigh each pass by itself, and average: S and the weights of all samples, sum 1."""
        self.optimizer.zero_grad()
        members, weights = [], []
        for samples in passes:
            loss = self.criterion(self.model(self.data.x[samples]), self.data.y[samples])
            (loss / len(passes)).backward()
            members.append(self.optimizer.last_step.worst_off)
            weights.append(self.optimizer.last_step.weights / len(passes))
        return torch.cat(members), torch.cat(weights)

    def agreement(self, passes: Sequence[Tensor]) -> tuple[float, float]:
        """Share of the weight, and of S, that both ways give to the same samples."""
        members, weights = self.gradient([torch.cat(list(passes))])
        other_members, other_weights = self.gradient(passes)
        common = float((members & other_members).sum() / members.sum())
        return float(torch.minimum(weights, other_weights).sum()), common


def run(
    train: Samples, test: Samples, ranks: int, by_label: bool, seed: int, epochs: int
) -> dict[str, float]:
    training, compared, steps = Training(train, seed), [], 0
    total = epochs * (len(train) // ranks // (BATCH_SIZE // ranks) + 1)
    decay = CosineAnnealingLR(training.optimizer, total)
    for epoch in range(epochs):
        for passes in shards(train, ranks, by_label, seed + 1000 * epoch):
            if ranks > 1 and steps % COMPARE_EVERY == 0:
                compared.append(training.agreement(passes))
            training.gradient(passes)
            training.optimizer.step()
            decay.step()
            steps += 1
    found = evaluate(outputs_of(training.model, test.x), test, None, smallest=1, tail=ALPHA)
    weight, members = (torch.tensor(compared).mean(0) if compared else torch.ones(2)).tolist()
    shown = {name: found[name] for name in ("accuracy", "worst label x sex", "tail loss")}
    return shown | {"weight in common": weight, "S in common": members}


def table(seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Means, and half the widths of their 95 % t-intervals."""
    train, test = adult()
    settings = [(1, False)] + [(r, by_label) for by_label in (False, True) for r in RANKS]
    rows, worst, whole = [], "worst label x sex", None
    for ranks, by_label in settings:
        runs = [run(train, test, ranks, by_label, seed, epochs) for seed in range(seeds)]
        frame = pd.DataFrame(runs)
        whole = frame[worst] if whole is None else whole
        name = "global" if ranks == 1 else f"local, {ranks} processes"
        row: dict[str, Any] = {"S": name, "shards": "by label" if by_label else "at random"}
        columns = {metric: frame[metric] for metric in frame}
        if ranks > 1:
            columns["worst, less global's"] = frame[worst] - whole
        for metric, values in columns.items():
            row[metric], row[f"± {metric}"] = report.interval(values)
        print(row, flush=True)
        rows.append(row)
    return rows


def _parameters(rank: int, steps: int) -> Tensor:
    train, _ = adult()
    training = Training(train, 0, DistributedDataParallel, worst_off="local")
    for passes in islice(shards(train, 2, False, seed=0), steps):
        training.gradient([passes[rank]])
        training.optimizer.step()
    return parameters_to_vector(training.model.parameters()).detach()


def check(steps: int = 20) -> float:
    """The largest difference between two processes' parameters and one's two passes."""
    apart = in_two_processes(_parameters, steps)
    train, _ = adult()
    training = Training(train, seed=0)
    for passes in islice(shards(train, 2, False, seed=0), steps):
        training.gradient(passes)
        training.optimizer.step()
    assert torch.equal(*apart), "the processes' parameters differ"
    return float(
        (apart[0] - parameters_to_vector(training.model.parameters())).abs().max().detach()
    )


def main(given: list[str]) -> None:
    chosen = report.options(__doc__, given, check="against two real processes")
    if chosen.check:
        print(f"largest difference of a parameter after 20 steps: {check():.1e}")
        return
    seeds, epochs = (1, 1) if chosen.fast else (5, 3)
    report.save("distributed_local", table(seeds, epochs), chosen.fast, epochs=epochs, seeds=seeds)
