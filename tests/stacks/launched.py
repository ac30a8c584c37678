"""A training in the processes that a framework starts: ``launched.py FRAMEWORK FILE``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import ALPHA, BATCH, make_loader, make_model, sgd
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from irw_optim import IRWOptimizer

EPOCHS = 2


def accelerate(file: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, criterion = make_model(), nn.CrossEntropyLoss()
    irw = IRWOptimizer(sgd(model), alpha=ALPHA, model=model, criterion=criterion)
    prepared, optimizer, loader = accelerator.prepare(model, irw, make_loader())
    for _ in range(EPOCHS):
        for x, y in loader:
            accelerator.backward(criterion(prepared(x), y))
            optimizer.step()
            optimizer.zero_grad()
    save(model, irw, file)
    accelerator.end_training()


def lightning(file: str) -> None:
    from lightning import LightningModule, Trainer

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = make_model(), nn.CrossEntropyLoss()

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            return self.criterion(self.net(x), y)

        def configure_optimizers(self) -> Any:
            inner = sgd(self)
            return IRWOptimizer(inner, alpha=ALPHA, model=self, criterion=self.criterion)

        def train_dataloader(self) -> Any:
            data = make_loader().dataset  # in order: by itself, Lightning would shuffle it
            sampler = DistributedSampler(data, shuffle=False)
            return DataLoader(data, batch_size=BATCH, sampler=sampler)

        def on_train_end(self) -> None:
            save(self.net, self.optimizers(), file)

    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier())


def save(model: nn.Module, optimizer: IRWOptimizer, file: str) -> None:
    """What each rank has at the end."""
    record = optimizer.last_step
    states = {"parameters": list(model.parameters()), "samples": len(record.weights)}
    rank = torch.distributed.get_rank()
    torch.save({**states, "ranks": torch.distributed.get_world_size()}, f"{file}.{rank}")


if __name__ == "__main__":
    {"accelerate": accelerate, "lightning": lightning}[sys.argv[1]](sys.argv[2])
