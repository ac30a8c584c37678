"""IRW and IRWO: the library's optimizer and schemes in the benchmark's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fairness.data import Samples
from benchmarks.fairness.loop import Recipe, Trainer, shuffled
from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme


@dataclass(frozen=True)
class Intrinsic:
    """`IRWOptimizer` with its options; ``warm_up`` is a share of the steps."""

    alpha: float
    warm_up: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        optimizer = self.optimizer(model, recipe)
        return Trainer(
            optimizer,
            lambda losses, index: optimizer.backward(losses, labels=data.y[index]),
            shuffled(len(data), recipe.batch, seed),
        )

    def optimizer(self, model: nn.Module, recipe: Recipe, **more: Any) -> IRWOptimizer:
        return IRWOptimizer(
            recipe.optimizer(model),
            alpha=self.alpha,
            model=model,
            warmup_steps=round(self.warm_up * recipe.steps),
            **{**self.options, **more},
        )


@dataclass(frozen=True)
class Global:
    """The global scheme: weights of all samples, renewed every epoch as in the paper."""

    local: Intrinsic
    use: str = "reweighting"
    refresh: int = 1
    unit: str = "epochs"

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        optimizer = self.local.optimizer(model, recipe, criterion=nn.CrossEntropyLoss())
        positions = DataLoader(
            TensorDataset(torch.arange(len(data))),
            batch_size=min(recipe.batch, len(data)),
            shuffle=True,
            drop_last=True,
            collate_fn=_stacked,
            generator=torch.Generator().manual_seed(seed),
        )
        scheme = GlobalScheme(
            optimizer,
            positions,
            refresh=self.refresh,
            unit=self.unit,
            use=self.use,
            forward=_reader(data),
            batch_size=4096,
            progress=False,
            seed=seed,
        )

        def batches():
            while True:
                yield from scheme

        return Trainer(
            optimizer,
            lambda losses, index: optimizer.backward(losses, labels=data.y[index]),
            batches(),
        )


def _stacked(positions: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([position for (position,) in positions])


def _reader(data: Samples) -> Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]:
    return lambda model, index: (model(data.x[index]), data.y[index])
