"""PyTorch Lightning: automatic and manual optimization, Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import (
    ALL_WORST_OFF,
    ALPHA,
    BATCHES,
    close,
    equal,
    make_loader,
    make_model,
    plain_loop,
    sgd,
)
from torch import nn

from irw_optim import IRWOptimizer

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance\\(treespec, LeafSpec\\):"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]


class Classifier(lightning.LightningModule):
    def __init__(self, manual: bool = False, **options: Any) -> None:
        super().__init__()
        self.net = make_model()
        self.criterion = nn.CrossEntropyLoss()
        self.options = options
        self.automatic_optimization = not manual
        self.validated: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        loss = self.criterion(self.net(x), y)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.validated.append(float(self.criterion(self.net(x), y)))

    def configure_optimizers(self) -> Any:
        options = {"alpha": ALPHA, **self.options}
        optimizer = IRWOptimizer(sgd(self), model=self, criterion=self.criterion, **options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)]


def fit(
    module: Classifier, path: Path, epochs: int = 1, checkpoint: Any = None, **options: Any
) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, make_loader(), make_loader(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("manual", [False, True])
def test_training(tmp_path: Path, manual: bool) -> None:
    module = Classifier(manual)
    trainer = fit(module, tmp_path, epochs=2)
    expected, _ = plain_loop(epochs=2)
    assert equal(module.net, expected)
    optimizer = module.optimizers()
    assert isinstance(optimizer, IRWOptimizer)
    assert optimizer.steps == trainer.global_step == 2 * BATCHES
    assert optimizer.last_step is trainer.optimizers[0].last_step is not None
    assert module.validated, "the criterion is its own in validation"


def test_gradient_clipping(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, tmp_path, gradient_clip_val=1e-2)
    assert equal(module.net, plain_loop(clip=1e-2)[0])


@pytest.mark.parametrize("k", [1, 2])
def test_accumulation_in_both_meanings(tmp_path: Path, k: int) -> None:
    module = Classifier(accumulation_steps=k)
    fit(module, tmp_path, accumulate_grad_batches=2)
    expected, _ = plain_loop(accumulate=2, accumulation_steps=k)
    assert equal(module.net, expected)


def test_a_short_logical_batch_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    module = Classifier(accumulation_steps=3)
    fit(module, tmp_path, accumulate_grad_batches=3)
    assert module.optimizers().steps == 2
    assert len(module.optimizers().last_step.weights) == 8


def test_resuming(tmp_path: Path) -> None:
    whole = Classifier(warmup_steps=2)
    fit(whole, tmp_path, epochs=3)
    first = Classifier(warmup_steps=2)
    fit(first, tmp_path, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    second = Classifier(warmup_steps=2)
    fit(second, tmp_path, epochs=3, checkpoint=tmp_path / "one.ckpt")
    assert equal(second.net, list(whole.net.parameters()))
    assert second.optimizers().steps == 3 * BATCHES


def test_averaged_weights_of_a_model_with_batchnorm(tmp_path: Path) -> None:
    """Its averages are moved in an epoch of their own, whose steps have no gradient."""
    module = Classifier()
    module.net = nn.Sequential(nn.BatchNorm1d(5), module.net)
    average = lightning.pytorch.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)
    fit(module, tmp_path, epochs=3, callbacks=[average])
    rows = torch.cat([x for x, _ in make_loader()])
    assert torch.allclose(module.net[0].running_mean, rows.mean(0), rtol=0.2, atol=0.1)
    assert module.optimizers().steps == 3 * BATCHES


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision(tmp_path: Path, precision: str) -> None:
    module = Classifier(**ALL_WORST_OFF)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = lightning.pytorch.plugins.MixedPrecision(
        precision, "cpu", scaler if precision == "16-mixed" else None
    )
    fit(module, tmp_path, plugins=[plugin])
    assert close(module.net, plain_loop(**ALL_WORST_OFF)[0], rtol=0.05)
    assert module.optimizers().last_step.weights.dtype == torch.float32


def test_fabric() -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(sgd(model), alpha=ALPHA, model=model, criterion=criterion)
    wrapped, proxy = fabric.setup(model, optimizer)
    for x, y in fabric.setup_dataloaders(make_loader()):
        proxy.zero_grad()
        fabric.backward(criterion(wrapped(x), y))
        fabric.clip_gradients(wrapped, proxy, max_norm=1e-2)
        proxy.step()
    assert equal(model, plain_loop(clip=1e-2)[0])
    assert isinstance(proxy, IRWOptimizer)
    assert proxy.steps == optimizer.steps == BATCHES
    assert proxy.state_dict()["irw"]["steps"] == BATCHES
    assert proxy.last_step is optimizer.last_step
