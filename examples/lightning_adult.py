"""Lightning: `configure_optimizers` changes, and a model is chosen without anybody's group.

    python examples/lightning_adult.py      # about a minute on one core

Trains on UCI Adult once with plain SGD and once with IRW around it. Clipping, a schedule, a logger
and checkpoints are Lightning's. Both trainings keep the epoch with the best worst_cluster_accuracy
on held-out people, which needs no group labels; the table at the end is the one that does.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from adult_data import People, load_adult
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWMonitor, IRWOptimizer
from irw_optim.metrics import group_accuracy, worst_cluster_accuracy

BATCH_SIZE = 256
OPTIONS = {"alpha": 0.3, "class_balance": True}


class Classifier(lightning.LightningModule):
    """Says who earns more than 50,000 dollars a year."""

    def __init__(self, features: int, irw: dict[str, Any] | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 2))
        self.criterion = nn.CrossEntropyLoss()  # called as a module: that is where IRW attaches
        self.irw = irw
        self.held_out: list[tuple[Tensor, Tensor, Tensor]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.criterion(self.net(x), y)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer: Any = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.irw is not None:
            optimizer = IRWOptimizer(optimizer, model=self, criterion=self.criterion, **self.irw)
            self.monitor = IRWMonitor(optimizer, every=20)
            self.monitor.log_to(self.logger)
        return [optimizer], [CosineAnnealingLR(optimizer, self.trainer.max_epochs)]

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.held_out.append((x, y, self.net(x).argmax(1)))

    def on_validation_epoch_end(self) -> None:
        x, y, predicted = map(torch.cat, zip(*self.held_out, strict=True))
        self.held_out.clear()
        self.log("cluster_score", worst_cluster_accuracy(x, y, predicted).score)


def loader(people: People, **options: Any) -> DataLoader[Any]:
    data = TensorDataset(torch.from_numpy(people.features), torch.from_numpy(people.labels))
    return DataLoader(data, BATCH_SIZE, **options)


def fit(people: People, held_out: People, epochs: int, irw: Any, folder: Path) -> Classifier:
    """Returns the model as it was after its best epoch."""
    lightning.seed_everything(0, verbose=False)
    model = Classifier(people.features.shape[1], irw)
    best = ModelCheckpoint(folder / "best", monitor="cluster_score", mode="max")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[best],
        logger=CSVLogger(folder / "log"),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(people, shuffle=True), loader(held_out))
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return model


@torch.no_grad()
def judge(model: Classifier, test: People) -> dict[str, float]:
    """Accuracies on the test split, in %."""
    predicted = model.net(torch.from_numpy(test.features)).argmax(1)
    groups = {
        "worst income × sex": test.group_of("income", "sex"),
        "worst race × sex": test.group_of("race", "sex"),
    }
    return {
        "accuracy": 100 * float((predicted.numpy() == test.labels).mean()),
        **{
            name: 100 * min(group_accuracy(test.labels, predicted, group).values())
            for name, group in groups.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--people", type=int, default=26049, help="train on that many")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")

    everybody, test = load_adult()
    people, held_out = everybody.hold_out(0.2)
    people = people.part(range(options.people))
    rows = {}
    for name, irw in {"plain": None, "IRW": OPTIONS}.items():
        with tempfile.TemporaryDirectory() as folder:
            model = fit(people, held_out, options.epochs, irw, Path(folder))
            rows[name] = judge(model, test)
            if irw is not None:
                logged = pd.read_csv(next(Path(folder).rglob("metrics.csv")))

    print("In Lightning's log, columns of the monitor:")
    columns = ["irw/mean_loss", "irw/worst_alpha_loss", "irw/effective_share"]
    print(logged.set_index("step")[columns].dropna().iloc[:: max(1, len(logged) // 6)].round(2))
    print("\nOn the test split, accuracies in %:")
    print(pd.DataFrame(rows).T.round(1).to_string())


if __name__ == "__main__":
    main()
