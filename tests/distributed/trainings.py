"""One training that runs in one process and in several, on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import models
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim import IRWOptimizer

FEATURES, CLASSES, LENGTH, WIDTH = 5, 3, 4, 6
SHARDS = {1: [37], 2: [20, 17], 4: [11, 1, 0, 25]}
"""Samples of each rank in every batch: unequal, and with four ranks one has none."""


class Recurrent(nn.Module):
    """What only autodiff covers."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(FEATURES, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.unsqueeze(1))[0][:, -1])


class Tagger(nn.Module):
    """One prediction a position: (B, classes, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(words))).transpose(1, 2)


class Spectral(nn.Module):
    """A filter of complex numbers between real layers."""

    def __init__(self) -> None:
        super().__init__()
        bins = FEATURES // 2 + 1
        self.first = nn.Linear(FEATURES, FEATURES)
        self.filter = nn.Parameter(torch.randn(bins, dtype=torch.cdouble))
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.first(x)) * self.filter
        return self.last(torch.fft.irfft(spectrum, n=FEATURES))


class Branching(nn.Module):
    """One of two layers for each sample; a rank may have no use for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.one, self.other = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        output = hidden[:, :CLASSES]
        for chosen, layer in ((x[:, 0] > 0, self.one), (x[:, 0] <= 0, self.other)):
            if chosen.any():
                output = output.index_put((chosen,), layer(hidden[chosen]))
        return output


class Block(nn.Module):
    """Attention and a perceptron, as in a transformer; positions are a parameter of the model."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.perceptron = models.mlp(WIDTH, 9, WIDTH, act=nn.GELU)

    def forward(self, h: Tensor) -> Tensor:
        n = self.norm(h)
        n = n if self.batch_first else n.transpose(0, 1)
        attended = self.attention(n, n, n, need_weights=False)[0]
        h = h + self.scale * (attended if self.batch_first else attended.transpose(0, 1))
        return h + self.perceptron(h)


class Transformer(nn.Module):
    """Every number of a sample is a word; the weight of the first layer may be tied to another."""

    def __init__(self, batch_first: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, FEATURES, WIDTH))
        self.blocks = nn.ModuleList([Block(batch_first), Block(batch_first)])
        self.head = nn.Linear(WIDTH, CLASSES)
        if tied:
            self.blocks[1].perceptron = self.blocks[0].perceptron

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unsqueeze(2)) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


def time_first() -> nn.Module:
    return Transformer(batch_first=False)


def mlp() -> nn.Module:
    return models.mlp(FEATURES, 8, CLASSES)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, FEATURES)),
        nn.Conv2d(1, 4, (1, 3), padding=(0, 1)),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * FEATURES, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": Transformer,
    "time first": time_first,
    "mlp": mlp,
    "images": images,
    "gru": Recurrent,
    "tagger": Tagger,
    "branching": Branching,
    "spectral": Spectral,
}


def data(words: bool = False, ignored: bool = False) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    size = sum(SHARDS[1])
    if not words:
        y = torch.randint(CLASSES, (size,), generator=draw)
        if ignored:
            y[[0, 3, 22, 30]] = -100
        x = torch.randn(size, FEATURES, generator=draw).double()
        x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(size) < 20, 1, -1)  # for `Branching`
        return x, y
    y = torch.randint(CLASSES, (size, LENGTH), generator=draw)
    y[20:, 2:] = -100  # in one shard alone
    y[30] = -100
    return torch.randint(7, (size, LENGTH), generator=draw), y


def samples(passes: int, world_size: int) -> list[list[Tensor]]:
    """For each pass, the samples of each rank; together they are all samples."""
    shards = torch.arange(sum(SHARDS[1])).split(SHARDS[world_size])
    return [list(part) for part in zip(*(s.tensor_split(passes) for s in shards), strict=True)]


def whole(parameter: Tensor) -> Tensor:
    """Its values, from all processes where it is sharded."""
    values: Any = parameter.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values


@dataclass
class Training:
    """What to train with; `run` is the training itself."""

    model: str = "mlp"
    steps: int = 4
    way: int = 1
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    irw: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    no_sync: bool = False
    ignored: bool = False
    around: bool = False
    """Whether the optimizer is given the DDP, and not the module that is in it."""
    lr: float = 0.3
    """Small where there are many steps, which would make rounding large."""

    def alone(self, ranks: int) -> dict[str, Any]:
        """In one process, on the batches that so many ranks have together."""
        return self._run([torch.cat(part) for part in samples(self.passes, ranks)], 1)

    def __call__(self, rank: int, world_size: int) -> dict[str, Any]:
        """On one of several ranks."""
        return self._run([part[rank] for part in samples(self.passes, world_size)], world_size)

    def _run(self, passes: list[Tensor], world_size: int) -> dict[str, Any]:
        torch.manual_seed(0)
        module = MODELS[self.model]().double()
        called: nn.Module = module
        if world_size > 1:
            called = self._spread(module)
        criterion = self.criterion
        optimizer = IRWOptimizer(
            torch.optim.SGD(module.parameters(), lr=self.lr, momentum=0.9),
            alpha=0.2,
            model=called if self.around else module,
            criterion=criterion if self.way == 1 else None,
            **self.irw,
        )
        x, y = data(self.model == "tagger", self.ignored)
        for step in range(self.steps):
            optimizer.zero_grad()
            for number, part in enumerate(passes, start=1):
                # A static graph is learnt in the first iteration, which torch wants reduced.
                waits = number < len(passes) and not (step == 0 and self.ddp.get("static_graph"))
                waits = waits and self.no_sync and world_size > 1
                with called.no_sync() if waits else nullcontext():
                    self._backward(called, optimizer, x[part], y[part])
            optimizer.step()
        optimizer.detach()
        record = optimizer.last_step
        return {
            "parameters": torch.cat([whole(p).flatten() for p in module.parameters()]),
            "record": record,
            "samples": torch.cat(passes) if optimizer.accumulation_steps > 1 else passes[-1],
            "steps": optimizer.steps,
        }

    def _spread(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, **self.ddp)

    def _backward(self, called: nn.Module, optimizer: IRWOptimizer, x: Tensor, y: Tensor) -> None:
        if self.way == 1:
            (self.criterion(called(x), y) / self.passes).backward()
        else:
            losses = nn.functional.cross_entropy(called(x), y, reduction="none")
            optimizer.backward(losses / self.passes)


def check_the_update_of_one(outcomes: list[Any], alone: Any) -> None:
    """What the ranks' training ended with is what one process's did, and so is the last record.

    Args:
        outcomes: of the ranks.
        alone: of one process on the batches of all of them.
    """
    order = torch.cat([outcome["samples"] for outcome in outcomes])
    place = torch.cat([(alone["samples"] == sample).nonzero()[0] for sample in order])
    for outcome in outcomes:
        assert torch.equal(outcome["parameters"], outcomes[0]["parameters"]), "ranks apart"
        difference = (outcome["parameters"] - alone["parameters"]).norm()
        assert difference <= 1e-9 * alone["parameters"].norm()
        assert outcome["steps"] == alone["steps"]
        record, expected = outcome["record"], alone["record"]
        for name in ("losses", "scores", "weights"):
            values = getattr(expected, name)[place]
            torch.testing.assert_close(getattr(record, name), values, rtol=1e-7, atol=1e-9)
        assert torch.equal(record.worst_off, expected.worst_off[place])
        assert torch.equal(record.outliers, expected.outliers[place])
        assert bool(record.fallback) == bool(expected.fallback)
        assert torch.equal(order[record.own], outcome["samples"])
