"""Hugging Face Accelerate: prepare in any order, accumulate, mixed precision, checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
    make_data,
    make_loader,
    make_model,
    plain_loop,
    sgd,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWOptimizer

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Training:
    def __init__(
        self,
        accelerator: Any,
        order: tuple[int, ...] = (0, 1, 2, 3),
        apart: bool = False,
        **options: Any,
    ) -> None:
        self.accelerator = accelerator
        self.model, self.criterion = make_model(), nn.CrossEntropyLoss()
        self.irw = IRWOptimizer(
            sgd(self.model),
            **{"alpha": ALPHA, "model": self.model, "criterion": self.criterion, **options},
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.irw, 1.0)
        parts = [self.model, self.irw, make_loader(), scheduler]
        if apart:
            prepared = [accelerator.prepare(parts[i]) for i in order]
        else:
            prepared = list(accelerator.prepare(*(parts[i] for i in order)))
        by_part = dict(zip(order, prepared, strict=True))
        self.prepared, self.optimizer, self.loader, self.scheduler = (by_part[i] for i in range(4))

    def train(self, epochs: int = 1, clip: float | None = None) -> Training:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.prepared):
                    self.accelerator.backward(self.criterion(self.prepared(x), y))
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.prepared.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3], ids=str)
def test_prepare_in_any_order(order: tuple[int, ...], apart: bool) -> None:
    training = Training(accelerate.Accelerator(cpu=True), order, apart).train(epochs=2)
    assert equal(training.model, plain_loop(epochs=2)[0])
    assert training.irw.steps == 2 * BATCHES


def test_clipping() -> None:
    training = Training(accelerate.Accelerator(cpu=True)).train(clip=1e-2)
    assert equal(training.model, plain_loop(clip=1e-2)[0])


@pytest.mark.parametrize("k", [1, 2])
def test_accumulate_in_both_meanings(k: int) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    training = Training(accelerator, accumulation_steps=k).train()
    expected, plain = plain_loop(accumulate=2, accumulation_steps=k)
    assert equal(training.model, expected)
    assert training.irw.steps == plain.steps == BATCHES // 2


def test_a_short_logical_batch_at_the_end_of_the_loader() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    training = Training(accelerator, accumulation_steps=3).train()
    assert training.irw.steps == 2
    assert len(training.irw.last_step.weights) == 8


def test_mixed_precision() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    training = Training(accelerator, **ALL_WORST_OFF).train()
    assert close(training.model, plain_loop(**ALL_WORST_OFF)[0], rtol=0.05)
    assert training.irw.last_step.scores.dtype == torch.float32


def test_a_scaler_that_skips() -> None:
    """Accelerate's fp16 needs an accelerator; its optimizer with a scaler does not."""
    accelerator = accelerate.Accelerator(cpu=True)
    training = Training(accelerator)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(training.irw, scaler=scaler)
    before = [p.detach().clone() for p in training.model.parameters()]
    for x, y in make_loader():
        scaler.scale(training.criterion(training.model(x), y)).backward()
        if training.irw.steps == 2:
            next(training.model.parameters()).grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in training.model.parameters()]
            optimizer.step()
            assert optimizer.step_was_skipped
            assert equal(training.model, before)
            break
        optimizer.step()
        assert not optimizer.step_was_skipped
        optimizer.zero_grad()
    assert training.irw.steps == 2


def test_checkpoints(tmp_path: Path) -> None:
    whole = Training(accelerate.Accelerator(cpu=True), warmup_steps=2).train(epochs=3)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    first = Training(accelerate.Accelerator(cpu=True), warmup_steps=2).train(epochs=1)
    first.accelerator.save_state(str(tmp_path))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    second = Training(accelerate.Accelerator(cpu=True), warmup_steps=2)
    second.accelerator.load_state(str(tmp_path))
    second.train(epochs=2)
    assert equal(second.model, list(whole.model.parameters()))
    assert second.irw.steps == 3 * BATCHES


def test_way_two() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    irw = IRWOptimizer(sgd(model), alpha=ALPHA, model=model)
    model, optimizer = accelerator.prepare(model, irw)
    for x, y in make_loader():
        irw.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        optimizer.step()
        optimizer.zero_grad()
    assert equal(model, plain_loop()[0])


def test_wrapping_what_was_prepared_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer.*wrap the plain optimizer first"):
        IRWOptimizer(optimizer, alpha=ALPHA, model=model)


def test_a_model_that_was_prepared_before_the_optimizer_was_made() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, criterion = accelerator.prepare(make_model()), nn.CrossEntropyLoss()
    optimizer = accelerator.prepare(
        IRWOptimizer(sgd(model), model=model, criterion=criterion, **ALL_WORST_OFF)
    )
    for x, y in DataLoader(TensorDataset(*make_data()), batch_size=8):
        accelerator.backward(criterion(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert close(model, plain_loop(**ALL_WORST_OFF)[0], rtol=0.05)
