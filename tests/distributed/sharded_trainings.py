"""The training of `trainings`, with the parameters spread over the processes by `fully_shard`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from models import mlp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from trainings import CLASSES, FEATURES, MODELS, Training, Transformer

from irw_optim import IRWOptimizer
from irw_optim.distributed.shards import TESTED_FROM


def with_batch_statistics() -> nn.Module:
    """Only the last layer's gradients are those of single samples."""
    return mlp(FEATURES, 8, CLASSES, norm=nn.BatchNorm1d, act=nn.ReLU)


class Mixing(nn.Module):
    """Every sample's output depends on the batch, which no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h - h.mean(0))


class Fading(nn.Module):
    """Counts its calls, and passes on less in each."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 1 / self.calls)


class Checkpointed(nn.Module):
    """The first layers run again in every backward pass, and are not what they were then."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*mlp(FEATURES, 8, 8), Fading())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def partly_frozen() -> nn.Module:
    model = MODELS["mlp"]()
    model[0].weight.requires_grad_(False)
    return model


MODELS.update(
    {
        "tied": lambda: Transformer(tied=True),
        "batch statistics": with_batch_statistics,
        "mixing": Mixing,
        "frozen": partly_frozen,
        "checkpointed": Checkpointed,
    }
)


CAN_SHARD = torch.__version__ >= TESTED_FROM


@dataclass
class ShardedTraining(Training):
    """`fully_shard` takes the place of DistributedDataParallel.

    Attributes:
        layers: what is sharded by itself: each child of the model (blocks of a list one by one),
            or nothing but the whole.
        fsdp: arguments of `fully_shard`.
    """

    layers: str = "children"
    fsdp: dict[str, Any] = field(default_factory=dict)

    def _spread(self, module: nn.Module) -> nn.Module:
        shard(module, self.layers, **self.fsdp)
        return module


def shard(module: nn.Module, layers: str = "children", **fsdp: Any) -> None:
    """Apply `fully_shard` to the layers, then to the whole."""
    for child in module.children() if layers == "children" else ():
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            if any(True for _ in part.parameters()) and not _tied_in(module):
                fully_shard(part, **fsdp)
    fully_shard(module, **fsdp)


def _tied_in(module: nn.Module) -> bool:
    """Tied parameters have to be in one group."""
    return isinstance(module, Transformer) and (
        module.blocks[0].perceptron is module.blocks[1].perceptron
    )


def optimizer_for(model: nn.Module, criterion: nn.Module | None = None, **irw: Any) -> IRWOptimizer:
    inner = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return IRWOptimizer(inner, model=model, criterion=criterion, **{"alpha": 0.2, **irw})
