"""float32, autocast and a gradient scaler over processes, in DDP and under `fully_shard`."""

from __future__ import annotations

from typing import Any

import pytest
import ranked
import torch
from sharded_trainings import CAN_SHARD, optimizer_for, shard
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from trainings import data, mlp, whole

from irw_optim import DBSCANFilter, PerSampleLoss, StepRecord

pytestmark = pytest.mark.slow

SPREADS = ["ddp", "fsdp"] if CAN_SHARD else ["ddp"]
STEPS = 5
FACTORS = [1e-30, 1e-24, 1e20]
REMOVES_SOME = DBSCANFilter(quantile=0.8)


class Steps:
    """Some steps in float32.

    Args:
        spread: ``"ddp"`` or ``"fsdp"``.
        dtype: of autocast; None for none.
        **irw: options.
    """

    def __init__(self, spread: str, dtype: torch.dtype | None = None, **irw: Any) -> None:
        self.spread = spread
        self.dtype = dtype
        self.irw = irw

    def __call__(self, rank: int, world_size: int) -> tuple[Tensor, Any]:
        called, model, x, y = setting(self.spread, rank, world_size)
        criterion = nn.CrossEntropyLoss()
        optimizer = optimizer_for(model, criterion, **self.irw)
        before = values(model)
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                loss = criterion(called(x), y)
            loss.backward()
            optimizer.step()
        optimizer.detach()
        return values(model) - before, optimizer.last_step


class Overflow:
    """A gradient scaler whose scale is too much for one sample of the last rank, once."""

    def __init__(self, spread: str) -> None:
        self.spread = spread

    def __call__(self, rank: int, world_size: int) -> list[tuple[Tensor, int, float]]:
        called, model, x, y = setting(self.spread, rank, world_size)
        criterion = nn.CrossEntropyLoss()
        optimizer = optimizer_for(model, criterion)
        scaler = GradScaler("cpu", init_scale=2.0**50, growth_interval=1000)
        found = []
        for step in range(3):
            optimizer.zero_grad()
            factor = torch.ones(len(x), 1)
            if step == 1 and rank == world_size - 1:
                factor[-1] = 1e30
            scaler.scale(criterion(called(x) * factor, y)).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append((values(model), optimizer.steps, scaler.get_scale()))
        optimizer.detach()
        return found


class Scaled:
    """One pass with losses times a factor, whose scores float32 may not hold."""

    def __init__(self, spread: str, factor: float, **irw: Any) -> None:
        self.spread = spread
        self.factor = factor
        self.irw = irw

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, reduction="none") * self.factor

    def __call__(self, rank: int, world_size: int) -> StepRecord:
        called, model, x, y = setting(self.spread, rank, world_size)
        criterion = PerSampleLoss(self.losses)
        optimizer = optimizer_for(model, criterion, **self.irw)
        criterion(called(x), y).backward()
        optimizer.detach()
        return optimizer.last_step


def setting(spread: str, rank: int, world_size: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = mlp()
    called: nn.Module = model
    x, y = data()
    part = torch.arange(len(x))
    if world_size > 1:
        part = part.split([20, 17])[rank]
        if spread == "fsdp":
            shard(model)
        else:
            called = DistributedDataParallel(model)
    return called, model, x[part].float(), y[part]


def values(model: nn.Module) -> Tensor:
    return torch.cat([whole(p).flatten() for p in model.parameters()])


CASES: dict[str, ranked.Case] = {}
for spread in SPREADS:
    CASES[f"float32, {spread}"] = Steps(spread)
    # With 8 bits, losses tie or nearly do, and rounding would decide who is in S: so all are.
    CASES[f"bfloat16, {spread}"] = Steps(spread, torch.bfloat16, alpha=1.0)
    CASES[f"overflow, {spread}"] = Overflow(spread)
    for factor in FACTORS:
        CASES[f"IRW, {factor}, {spread}"] = Scaled(spread, factor)
        CASES[f"IRWO, {factor}, {spread}"] = Scaled(spread, factor, outliers=REMOVES_SOME)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranked.run(CASES, 2, tmp_path_factory.mktemp("precision"))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
    ("case", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)], ids=["float32", "bfloat16"]
)
def test_as_close_as_the_precision_is(found, case, tolerance, spread):
    """The tolerance is on the update, not on the parameters, and plain steps are far outside."""
    steps: Any = CASES[f"{case}, {spread}"]
    expected, record = steps(0, 1)
    plain, _ = Steps(spread, steps.dtype, weighting="uniform")(0, 1)
    assert (plain - expected).norm() > 10 * tolerance * expected.norm()
    for update, other in found.of(f"{case}, {spread}"):
        assert (update - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(other.worst_off, record.worst_off)
        assert other.scores.dtype == torch.float32
        size = float(record.scores.abs().max())
        torch.testing.assert_close(
            other.scores, record.scores, rtol=5 * tolerance, atol=tolerance * size
        )


@pytest.mark.parametrize("spread", SPREADS)
def test_an_overflow_on_one_rank_skips_the_step_on_all(found, spread):
    alone = Overflow(spread)(0, 1)
    for steps in found.of(f"overflow, {spread}"):
        (first, _, scale), (second, *_), (third, *_) = steps
        assert torch.equal(first, second)
        assert not torch.equal(second, third)
        assert [taken for _, taken, _ in steps] == [1, 1, 2]
        assert [now for *_, now in steps] == [scale, scale / 2, scale / 2]
        for (mine, *_), (expected, *_) in zip(steps, alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("kind", ["IRW", "IRWO"])
def test_weights_are_free_of_the_scale_of_the_losses(found, kind, factor, spread):
    expected = Scaled(spread, 1.0, **CASES[f"{kind}, {factor}, {spread}"].irw)(0, 1)
    assert bool(expected.outliers.any()) == (kind == "IRWO")
    for record in found.of(f"{kind}, {factor}, {spread}"):
        assert torch.equal(record.outliers, expected.outliers)
        torch.testing.assert_close(record.weights, expected.weights, rtol=1e-3, atol=1e-5)
