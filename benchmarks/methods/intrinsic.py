"""IRW and IRWO: the library's optimizer and schemes in the benchmark's loop."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.data.memory import shuffled
from benchmarks.data.sources import Samples
from benchmarks.training import Recipe, Trainer
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
        return self.trainer(optimizer, data, shuffled(len(data), recipe.batch, seed))

    def trainer(self, optimizer: IRWOptimizer, data: Samples, batches: Iterator[Tensor]) -> Trainer:
        def backward(losses: Tensor, index: Tensor) -> None:
            optimizer.backward(losses, labels=data.y[index])

        return Trainer(optimizer, backward, batches)

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
    use: str

    def prepare(self, model: nn.Module, data: Samples, recipe: Recipe, seed: int) -> Trainer:
        optimizer = self.local.optimizer(model, recipe, criterion=nn.CrossEntropyLoss())
        people: Any = range(len(data))
        positions = DataLoader(
            people,
            batch_size=min(recipe.batch, len(data)),
            shuffle=True,
            drop_last=True,
            collate_fn=torch.tensor,
            generator=torch.Generator().manual_seed(seed),
        )
        scheme = GlobalScheme(
            optimizer,
            positions,
            use=self.use,
            forward=lambda network, index: (network(data.x[index]), data.y[index]),
            batch_size=4096,
            progress=False,
            seed=seed,
        )

        def batches() -> Iterator[Tensor]:
            while True:
                yield from scheme

        return self.local.trainer(optimizer, data, batches())
