"""Trainings by weights of the whole data set that run in one process and in several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from trainings import data, mlp

from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme

SHARES = {1: [16], 2: [10, 6], 4: [5, 1, 0, 10]}
"""Samples of each rank in every batch of `Chosen`; with four ranks one has none."""
BATCH = 4
"""Samples of each rank in every batch of `Drawn`."""


def data_set(size: int = 37, duplicates: bool = False) -> TensorDataset:
    """Or one whose last eight samples are the first eight again: rounding ranks their losses."""
    x, y = data()
    if duplicates:
        x, y = torch.cat([x[:-8], x[:8]]), torch.cat([y[:-8], y[:8]])
    return TensorDataset(x[:size], y[:size])


@dataclass
class GlobalTraining:
    """A model, its optimizer and the scheme; the subclasses say what the batches are."""

    irw: dict[str, Any] = field(default_factory=dict)
    scheme: dict[str, Any] = field(default_factory=dict)
    around: bool = True
    """Whether the optimizer is given the DDP, or the module that is put in one later."""
    way: int = 1

    def alone(self, ranks: int) -> dict[str, Any]:
        """In one process, on the batches that so many ranks have together."""
        return self._run(0, 1, ranks)

    def __call__(self, rank: int, world_size: int) -> dict[str, Any]:
        """On one of several ranks."""
        return self._run(rank, world_size, world_size)

    def begin(self, world_size: int, loader: DataLoader[Any]) -> None:
        torch.manual_seed(0)
        self.module = mlp().double()
        self.called: nn.Module = self.module
        if world_size > 1 and self.around:
            self.called = DistributedDataParallel(self.module)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = IRWOptimizer(
            torch.optim.SGD(self.module.parameters(), lr=0.3, momentum=0.9),
            model=self.called,
            criterion=self.criterion,
            **{"alpha": 0.25, **self.irw},
        )
        self.global_scheme = GlobalScheme(self.optimizer, loader, **self.scheme)
        if world_size > 1 and not self.around:
            self.called = DistributedDataParallel(self.module)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        if self.way == 1:
            self.criterion(self.called(x), y).backward()
        else:
            losses = nn.functional.cross_entropy(self.called(x), y, reduction="none")
            self.optimizer.backward(losses)
        self.optimizer.step()

    def outcome(self, **more: Any) -> dict[str, Any]:
        self.optimizer.detach()
        return {
            "parameters": parameters(self.module),
            "weights": self.global_scheme.weights,
            "scores": self.global_scheme.record.scores,
            "record": self.optimizer.last_step,
            **more,
        }

    def _run(self, rank: int, world_size: int, ranks: int) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class Chosen(GlobalTraining):
    """The loop chooses its batches: shards of unequal size, and empty ones."""

    steps: int = 10

    def _run(self, rank: int, world_size: int, ranks: int) -> dict[str, Any]:
        everything = data_set()
        self.begin(world_size, DataLoader(everything, batch_size=8))
        for step in range(self.steps):
            draw = torch.Generator().manual_seed(step)
            batch = torch.randperm(len(everything), generator=draw)[: sum(SHARES[ranks])]
            indices = batch.split(SHARES[ranks])[rank] if world_size > 1 else batch
            self.global_scheme.select(indices)
            self.step(*(t[indices] for t in everything.tensors))
        return self.outcome(samples=indices)


class BatchesOfAllRanks:
    """For one process: the batches that the DistributedSamplers of all ranks make together."""

    def __init__(self, size: int, ranks: int) -> None:
        everything = range(size)
        self.samplers = [DistributedSampler(everything, ranks, r, seed=3) for r in range(ranks)]
        self.batch_size = BATCH * ranks

    def set_epoch(self, epoch: int) -> None:
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.samplers[0]) // BATCH)

    def __iter__(self) -> Iterator[list[int]]:
        orders = [list(sampler) for sampler in self.samplers]
        for start in range(0, len(orders[0]), BATCH):
            yield [i for order in orders for i in order[start : start + BATCH]]


@dataclass
class Drawn(GlobalTraining):
    """Iterates over the scheme: a DistributedSampler in each rank, or resampling."""

    epochs: int = 3
    first: int = 0
    stop: int | None = None
    """The step after which the states are handed out, and the training ends."""
    states: Sequence[dict[str, Any]] = ()
    """What to go on from: one for each rank, or one for all."""
    size: int = 37

    def _run(self, rank: int, world_size: int, ranks: int) -> dict[str, Any]:
        loader = self.loader(data_set(self.size), rank, world_size, ranks)
        self.begin(world_size, loader)
        self.resume(rank)
        batches = []
        for epoch in range(self.first, self.epochs):
            order = loader.sampler if world_size > 1 else loader.batch_sampler
            if hasattr(order, "set_epoch"):
                order.set_epoch(epoch)
            for x, y in self.global_scheme:
                batches.append(self.global_scheme._held.indices)
                self.step(x, y)
                if self.optimizer.steps == self.stop:
                    return self.outcome(states=self._states(), batches=batches)
        return self.outcome(states=self._states(), batches=batches)

    def loader(self, everything: Any, rank: int, world_size: int, ranks: int) -> DataLoader[Any]:
        if self.scheme.get("use") == "resampling":
            return DataLoader(everything, batch_size=BATCH * ranks // world_size, shuffle=True)
        if world_size > 1:
            sampler = DistributedSampler(everything, world_size, rank, seed=3)
            return DataLoader(everything, batch_size=BATCH, sampler=sampler)
        batches = BatchesOfAllRanks(len(everything), ranks)
        return DataLoader(everything, batch_sampler=batches)  # type: ignore[arg-type]

    def _states(self) -> dict[str, Any]:
        return {
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheme": self.global_scheme.state_dict(),
        }

    def resume(self, rank: int) -> None:
        if not self.states:
            return
        # As from a file: what the test sent lies in memory that the ranks share.
        states = deepcopy(self.states[rank % len(self.states)])
        self.module.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.global_scheme.load_state_dict(states["scheme"])


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
