"""Activation checkpointing: the step is the loop's, in the memory of a checkpointed plain step."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import pytest
import reference
import torch
from agreement import gradient_errors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.model_check import peak_bytes

B, T, D = 6, 5, 8


class Blocks(nn.Module):
    """Transformer blocks, each of them checkpointed or none."""

    def __init__(
        self, checkpointed: bool, width: int = D, blocks: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout, batch_first=True)
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.mean(1))


def trained(model: nn.Module, x: Tensor, **options: Any) -> tuple[IRWOptimizer, nn.Module, Tensor]:
    """An optimizer around the model, and the targets of a batch."""
    criterion = nn.CrossEntropyLoss()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=0.3, model=model, criterion=criterion, **options)
    return optimizer, criterion, torch.randint(3, (len(x),))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": 1.0},
        {"class_balance": True},
        {"weighting": "cvar"},
        {"warmup_steps": 1},
        {"outliers": DBSCANFilter(eps=100.0)},
        {"engine": "ghost"},
        {"engine": "autodiff"},
    ],
    ids=str,
)
def test_every_step_is_the_loops(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Blocks(checkpointed=True).double(), torch.randn(B, T, D, dtype=torch.float64)
    optimizer, criterion, y = trained(model, x, **options)
    for step in range(3):
        state = torch.get_rng_state()
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        G = reference.per_sample_gradients(losses, model.parameters())
        torch.set_rng_state(state)  # the dropout of the loop is that of the step
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        weights = optimizer.last_step.weights
        for p, expected in zip(model.parameters(), split(weights @ G, model), strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
        if not options:
            truth = reference.decide(losses.detach(), G, 0.3)
            torch.testing.assert_close(weights, truth.weights, rtol=1e-9, atol=1e-12)
            assert optimizer.last_step.worst_off.tolist() == truth.worst_off.tolist(), step
        optimizer.step()


def split(vector: Tensor, model: nn.Module) -> list[Tensor]:
    """A vector of all numbers of a model as its parameters."""
    parts = vector.split([p.numel() for p in model.parameters()])
    return [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]


def test_a_graph_that_is_kept_is_passed_again() -> None:
    torch.manual_seed(0)
    model, x = Blocks(checkpointed=True, dropout=0.0).double(), torch.randn(B, T, D).double()
    optimizer, criterion, y = trained(model, x)
    outputs = model(x)
    losses = nn.functional.cross_entropy(outputs, y, reduction="none")
    truth = reference.step(losses, list(model.parameters()), 0.3)
    loss = criterion(outputs, y)
    for _ in range(2):
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        errors = gradient_errors(model, truth.gradients)
        assert max(errors.values()) < 1e-9, errors


def test_the_memory_that_was_to_be_spared_is_spared() -> None:
    peaks = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model, x = Blocks(checkpointed, width=32, blocks=6), torch.randn(16, 32, 32)
        optimizer, criterion, y = trained(model, x)

        def step() -> None:
            optimizer.zero_grad()  # noqa: B023
            criterion(model(x), y).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        for _ in range(5):  # comparisons with autograd are due at uses 1, 2 and 4
            step()
        peaks.append(peak_bytes(step))
    assert peaks[0] < 0.6 * peaks[1]


def test_the_log_says_how_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "irw_optim")
    model, x = Blocks(checkpointed=True), torch.randn(B, T, D)
    optimizer, criterion, y = trained(model, x)
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    said = [r for r in caplog.records if "checkpointing" in r.getMessage()]
    assert [r.levelno for r in said if r.levelno >= logging.INFO] == [logging.INFO]
    assert 'engine="ghost"' in said[0].getMessage()


class Averaging(nn.Module):
    """Normalises by BatchNorm, and counts in a buffer that it makes anew."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.map = nn.BatchNorm1d(width), nn.Linear(width, width)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        return torch.tanh(self.map(self.norm(x)))


class Averages(nn.Module):
    """One part that is checkpointed twice, one that is not, and one that stands behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.apart, self.again, self.last = Averaging(4), Averaging(4), Averaging(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.apart(x)
        for part in (self.again, self.again, self.last):
            x = checkpoint(part, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "autodiff"},
        {"score_parameters": "last"},
        {"outliers": DBSCANFilter(eps=100.0)},
        {"weighting": "cvar"},
        {"warmup_steps": 2},
    ],
    ids=str,
)
def test_what_a_forward_changes_is_changed_as_often_as_in_a_plain_step(
    options: dict[str, Any],
) -> None:
    plain = Averages().double()
    ours = deepcopy(plain)
    inner = torch.optim.SGD(ours.parameters(), lr=0.0)
    criterion = nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(inner, alpha=0.3, model=ours, criterion=criterion, **options)
    for size in (8, 8, 8, 5, 8, 8):  # with comparisons at uses 1, 2, 4, and without
        x, y = torch.randn(size, 4, dtype=torch.float64), torch.randint(3, (size,))
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.zero_grad()
        criterion(ours(x), y).backward()
        optimizer.step()
        for (name, one), (_, other) in zip(
            ours.named_buffers(), plain.named_buffers(), strict=True
        ):
            assert torch.allclose(one, other, atol=1e-12), name


@pytest.mark.parametrize("options", [{}, {"engine": "autodiff"}], ids=str)
def test_a_logical_batch_changes_it_as_often_as_its_parts(options: dict[str, Any]) -> None:
    plain = Averages().double()
    ours = deepcopy(plain)
    inner = torch.optim.SGD(ours.parameters(), lr=0.0)
    criterion = nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        inner, alpha=0.3, model=ours, criterion=criterion, accumulation_steps=3, **options
    )
    for turn in range(12):
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        nn.functional.cross_entropy(plain(x), y).backward()
        criterion(ours(x), y).backward()
        if turn % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            for part in ("apart", "again", "last"):
                one, other = getattr(ours, part), getattr(plain, part)
                assert one.norm.num_batches_tracked == other.norm.num_batches_tracked
                assert one.seen == other.seen


class Drifting(nn.Module):
    """Computes something else each time, as spectral norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)
        self.register_buffer("times", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return torch.tanh(self.times * self.map(x))


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_every_pass_computes_the_same_part_again(engine: str) -> None:
    first, part, last = nn.Linear(4, 4), Drifting(), nn.Linear(4, 3)
    model = nn.ModuleList([first, part, last]).double()
    part.times = torch.zeros(())
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    optimizer, criterion, _ = trained(model, x, engine=engine)

    def output() -> Tensor:
        part.times.zero_()
        return last(checkpoint(part, first(x), use_reentrant=False))

    for _ in range(3):
        parameters, rows = list(model.parameters()), []
        losses = nn.functional.cross_entropy(output(), y, reduction="none")
        for loss in losses:
            part.times.fill_(1)  # as the forward left it
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
        G, worst = torch.stack(rows), losses.detach().topk(3).indices
        scores = (G @ G[worst].sum(0)).clamp(min=0)
        optimizer.zero_grad()
        criterion(output(), y).backward()
        assert reference.error(optimizer.last_step.weights, scores / scores.sum()) < 1e-10
        assert part.times == 2
        optimizer.step()
