"""`verify` compares passes that start from one state, and leaves that state behind."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim import DBSCANFilter, IRWOptimizer, PerSampleLoss, verify
from irw_optim.restored import restored


class Drawing(nn.Module):
    """Multiplies the output with a number that it draws."""

    def __init__(self, draw: Any, **attributes: Any) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(6, 3), draw
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1 + float(self.draw(self)))


def counted(model: Any) -> float:
    model.calls += 1
    return model.calls % 3


def remembered(model: Any) -> float:
    model.seen.append(len(model.seen))
    return len(model.seen) % 3


def noted(model: Any) -> float:
    model.notes["calls"] = model.notes.get("calls", 0) + 1
    return model.notes["calls"] % 3


def cached(model: Any) -> float:
    first = not hasattr(model, "cache")
    model.cache = torch.ones(1)
    return float(first)


def accumulated(model: Any) -> float:
    model.total.add_(1)
    return float(model.total)


def replaced_buffer(model: Any) -> float:
    model.total = model.total + 1
    return float(model.total)


def with_buffer(draw: Any) -> nn.Module:
    model = Drawing(draw)
    model.register_buffer("total", torch.zeros(()))
    return model


CASES = {
    "torch": lambda: Drawing(lambda m: torch.rand(())),
    "random": lambda: Drawing(lambda m: random.random()),
    "numpy": lambda: Drawing(lambda m: np.random.rand()),
    "a generator of torch": lambda: Drawing(
        lambda m: torch.rand((), generator=m.own), own=torch.Generator().manual_seed(3)
    ),
    "a generator of NumPy": lambda: Drawing(lambda m: m.own.random(), own=np.random.default_rng(3)),
    "a state of NumPy": lambda: Drawing(lambda m: m.own.rand(), own=np.random.RandomState(3)),
    "a generator of random": lambda: Drawing(lambda m: m.own.random(), own=random.Random(3)),
    "a counter": lambda: Drawing(counted, calls=0),
    "a list": lambda: Drawing(remembered, seen=[]),
    "a dictionary": lambda: Drawing(noted, notes={}),
    "a cache": lambda: Drawing(cached),
    "a tensor": lambda: Drawing(accumulated, total=torch.zeros(())),
    "a buffer changed in place": lambda: with_buffer(accumulated),
    "a buffer that is replaced": lambda: with_buffer(replaced_buffer),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.Linear(9, 3)),
    "in place on the input": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)),
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.randint(3, (8,))


@pytest.mark.parametrize("case", CASES)
def test_chance_and_state_are_no_errors(case):
    for _ in range(3):
        report = verify(CASES[case](), *batch(), nn.CrossEntropyLoss(), repeats=1)
        assert report.deterministic
        assert report.exact, str(report)
        assert "EXACT" in str(report)


@pytest.mark.parametrize("case", CASES)
def test_everything_is_as_it_was(case):
    model, (x, y) = CASES[case](), batch()

    def drawn() -> list[float]:
        state = torch.get_rng_state()
        numbers = [float(torch.rand(())), random.random(), np.random.rand()]
        torch.set_rng_state(state)
        return numbers

    def output() -> Tensor:
        with restored(model):
            return model(x.clone()).detach()

    before, kept = output(), x.clone()
    with restored(model):
        expected = drawn()
    with restored(model):
        verify(model, x, y, nn.CrossEntropyLoss(), repeats=1)
    assert torch.equal(output(), before)
    assert torch.equal(x, kept)
    with restored(model):
        assert drawn() == expected
    assert all(p.grad is None for p in model.parameters())
    verify(model, x, y, nn.CrossEntropyLoss(), repeats=1)
    assert torch.equal(model(x.clone()), before)


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


SCRIPTED: dict[str, Any] = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, batch()[0]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", SCRIPTED)
def test_a_scripted_model_is_as_it_was(how):
    model = SCRIPTED[how](normalised())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert verify(model, *batch(), nn.CrossEntropyLoss(), repeats=1).exact
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_recorded(without):
    model, (x, y) = mlp(6, 8, 3), batch()
    with without():
        assert verify(model, x, y, nn.CrossEntropyLoss(), repeats=1).exact


def test_a_frozen_model_is_named():
    with pytest.raises(ValueError, match="model has no parameter with requires_grad=True"):
        verify(mlp(6, 8, 3).requires_grad_(False), *batch(), nn.CrossEntropyLoss())


@pytest.mark.parametrize("repeats", [0, 1.5, "2"])
def test_an_impossible_number_of_rounds_is_named(repeats):
    with pytest.raises((TypeError, ValueError), match=f"repeats={repeats!r}: expected a whole"):
        verify(nn.Linear(6, 3), *batch(), nn.CrossEntropyLoss(), repeats=repeats)


@pytest.mark.parametrize("outliers", [None, DBSCANFilter()])
def test_samples_without_a_target_are_in_neither(outliers):
    x, y = batch()
    y[3:] = -100
    report = verify(mlp(6, 5, 3), x, y, nn.CrossEntropyLoss(), outliers=outliers, repeats=1)
    assert report.exact, str(report)


def test_samples_that_are_not_finite_are_named_as_by_the_optimizer():
    x, y = batch()
    x[3] = math.nan
    model = nn.Linear(6, 3)
    with pytest.raises(FloatingPointError, match=r"1 samples are not finite \(batch indices 3\)"):
        verify(model, x, y, nn.CrossEntropyLoss(), repeats=1)
    assert verify(model, *batch(), nn.CrossEntropyLoss(), repeats=1).exact  # and detached


def test_what_cannot_be_repeated_is_told():
    """An iterator does not go back."""
    unseen = iter(range(1, 1000))
    report = verify(Drawing(lambda m: next(unseen)), *batch(), nn.CrossEntropyLoss(), repeats=1)
    assert not report.deterministic
    assert not report.exact
    assert str(report).startswith("NOT DETERMINISTIC")
    assert "NOT EXACT" not in str(report)


def test_a_criterion_with_chance_of_its_own():
    def losses(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") * (1 + random.random())

    report = verify(nn.Linear(6, 3), *batch(), PerSampleLoss(losses), repeats=1)
    assert report.deterministic
    assert report.exact


class TestAMachineWithAGPU:
    @pytest.fixture(autouse=True)
    def _pretend(self, monkeypatch):
        """CUDA is there, nothing was ever allocated on it, and nobody may wait for it."""

        def no(*_: Any) -> None:
            raise AssertionError("asked CUDA about a model on the CPU")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for name in (
            "synchronize",
            "memory_allocated",
            "max_memory_allocated",
            "reset_peak_memory_stats",
            "get_rng_state",
        ):
            monkeypatch.setattr(torch.cuda, name, no)

    def test_a_model_on_the_cpu_is_measured_there(self):
        report = verify(nn.Linear(6, 3), *batch(), nn.CrossEntropyLoss(), repeats=1)
        assert report.exact
        assert report.memory_ratio > 0
        assert report.time_ratio > 0


def test_nothing_measured_is_no_division_by_zero(monkeypatch):
    monkeypatch.setattr("irw_optim.model_check.peak_bytes", lambda *_: 0)
    report = verify(nn.Linear(6, 3), *batch(), nn.CrossEntropyLoss(), repeats=1)
    assert math.isnan(report.memory_ratio)
    assert "nan" in str(report)


def test_the_gpu_of_the_model_is_the_one_that_is_asked(monkeypatch):
    asked: list[Any] = []
    pretended = SimpleNamespace(
        get_rng_state=lambda device: asked.append(device),
        set_rng_state=lambda state, device: asked.append(device),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: pretended)
    model = SimpleNamespace(
        parameters=lambda **_: [SimpleNamespace(device=torch.device("cuda", 1), grad=None)],
        modules=list,
    )
    with restored(model):
        pass
    assert asked == [torch.device("cuda", 1)] * 2


def test_the_verdict_comes_first_and_says_how_to_be_quick():
    torch.manual_seed(0)
    model = mlp(6, 5, 3, norm=nn.BatchNorm1d, act=None)
    report = verify(model, *batch(), nn.CrossEntropyLoss(), repeats=1)
    verdict, advice, *_ = str(report).splitlines()
    assert verdict.startswith("EXACT")
    assert "times the time" in verdict
    assert "0, 1, 2" in advice
    assert "two to three plain ones" in advice
    assert "GroupNorm" in advice
    assert f"which takes {1000 * report.plain_seconds:.2g} ms" in verdict
    quick = verify(nn.Linear(6, 3), *batch(), nn.CrossEntropyLoss(), repeats=1)
    assert quick.reason == ""
    assert str(quick).splitlines()[1] == ""
    assert "<td>autodiff</td>" in report._repr_html_()


class OneWay(torch.autograd.Function):
    """Whose gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Through(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OneWay.apply(x - x.mean(0))  # where samples have met


def test_one_backward_pass_a_sample_is_said_with_its_cost_and_how_to_avoid_it(caplog):
    torch.manual_seed(0)
    model, criterion = (
        nn.Sequential(nn.Linear(6, 5), Through(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
    )
    x, y = batch()
    report = verify(model, x, y, criterion, repeats=1)
    assert report.exact
    assert "a step takes 8 backward passes for it, one a sample" in str(report)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (said,) = [text for text in warned if "one backward pass a sample" in text]
    assert "8 a step here" in said
    assert "\n" not in said
    caplog.clear()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"model": model, "criterion": criterion, "score_parameters": "last"}
    optimizer = IRWOptimizer(sgd, alpha=0.3, **options)
    criterion(model(x), y).backward()
    optimizer.step()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
