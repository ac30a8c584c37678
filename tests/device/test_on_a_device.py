"""One device that is not the host: exact, and nothing strays from it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from models import Recurrent
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import DBSCANFilter, IRWOptimizer, verify
from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.schemes import GlobalScheme, global_weights
from irw_optim.schemes.batch_losses import _on

DEVICE = torch.get_default_device()
ALPHA, CLASSES, WIDTH, LENGTH = 0.4, 3, 8, 5


class Attending(nn.Module):
    """One layer of an encoder, with fused attention where the device has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(LENGTH, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * (WIDTH - 2), CLASSES),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": convolutional,
    "attending": Attending,
    "batch norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(LENGTH * WIDTH, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
    ),
    "LSTM": lambda: Recurrent(nn.LSTM(WIDTH, 6, batch_first=True), CLASSES),
    "GRU": lambda: Recurrent(nn.GRU(WIDTH, 6, batch_first=True), CLASSES),
    "RNN": lambda: Recurrent(nn.RNN(WIDTH, 6, batch_first=True), CLASSES),
    "batch norm, LSTM": lambda: nn.Sequential(
        nn.BatchNorm1d(LENGTH), Recurrent(nn.LSTM(WIDTH, 6, batch_first=True), CLASSES)
    ),
    "batch norm, two GRUs": lambda: nn.Sequential(
        nn.BatchNorm1d(LENGTH), Recurrent(nn.GRU(WIDTH, 6, 2, batch_first=True), CLASSES)
    ),
    "batch norm, two LSTMs without biases": lambda: nn.Sequential(
        nn.BatchNorm1d(LENGTH), Recurrent(nn.LSTM(WIDTH, 6, 2, False, batch_first=True), CLASSES)
    ),
}


def make(name: str = "convolutional") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(DEVICE, torch.float64)


def draw(size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(size, LENGTH, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (size,))


def attach(model: nn.Module, **options: object) -> tuple[IRWOptimizer, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion, **options), criterion


def train(model: nn.Module, optimizer: IRWOptimizer, criterion: nn.Module, seeds: range) -> None:
    device = next(model.parameters()).device
    for seed in seeds:
        x, y = (t.to(device) for t in draw(seed=seed))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", MODELS)
def test_steps_are_exact(name: str) -> None:
    model, twin = make(name), make(name)
    optimizer, criterion = attach(model)
    for seed in range(5):
        x, y = draw(seed=seed)
        twin.load_state_dict(model.state_dict())
        oracle = reference.step(
            F.cross_entropy(twin(x), y, reduction="none"), twin.parameters(), ALPHA
        )
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        floor = 0.1 * max(float(g.abs().max()) for g in oracle.gradients)
        for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
            assert p.grad.device.type == DEVICE.type
            assert reference.error(p.grad, gradient, floor) < 1e-9
        optimizer.step()


@pytest.mark.parametrize("name", ["convolutional", "batch norm"])
def test_targets_that_are_ignored_after_full_batches(name: str) -> None:
    """S is smaller then, and who is in it is not known before the step has waited."""
    model, ignored = make(name), [0, 2, 3, 5]
    optimizer, criterion = attach(model)
    for seed in range(5):
        x, y = draw(seed=seed)
        y[ignored if seed > 1 else []] = -100
        twin = copy.deepcopy(model)
        losses = F.cross_entropy(twin(x), y, reduction="none")
        removed = ignored if seed > 1 else ()
        oracle = reference.step(losses, twin.parameters(), ALPHA, removed=removed)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        record = optimizer.last_step
        assert record.worst_off.tolist() == oracle.worst_off.tolist()
        assert reference.error(record.weights.cpu(), oracle.weights.cpu()) < 1e-9
        for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
            assert reference.error(p.grad, gradient, 1e-3) < 1e-9


@pytest.mark.parametrize("name", ["convolutional", "batch norm"])
def test_nobody_with_a_target_moves_nothing(name: str) -> None:
    model = make(name)
    optimizer, criterion = attach(model)
    x, y = draw()
    criterion(model(x), torch.full_like(y, -100)).backward()
    assert not any(p.grad.any() for p in model.parameters())
    assert torch.equal(optimizer.last_step.weights, torch.full_like(x[:, 0, 0], 1 / len(x)))


@pytest.mark.parametrize("name", ["convolutional", "batch norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upstream", [0.0, math.inf, math.nan])
def test_what_arrives_at_the_loss_does_not_choose_the_weights(
    name: str, dtype: torch.dtype, upstream: float
) -> None:
    x, y = draw()
    weights = []
    for factor in (1.0, upstream):
        model = make(name).to(dtype)
        optimizer, criterion = attach(model)
        (criterion(model(x.to(dtype)), y) * factor).backward()
        weights.append(optimizer.last_step.weights)
        finite = [bool(p.grad.isfinite().all()) for p in model.parameters()]
        assert all(finite) == math.isfinite(factor)
    assert reference.error(weights[1], weights[0]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_no_kernel_makes_it_pass_row_by_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the derivative of a fused backward pass is refused, or a change were pushed wrongly."""
    passes = []
    row = AutodiffGradients._row
    monkeypatch.setattr(
        AutodiffGradients, "_row", lambda self, sample: passes.append(sample) or row(self, sample)
    )
    model = make(name)
    optimizer, criterion = attach(model)
    train(model, optimizer, criterion, range(4))
    assert not passes


def test_outliers_and_the_record_stay_on_the_device() -> None:
    model = make()
    optimizer, criterion = attach(model, outliers=DBSCANFilter())
    train(model, optimizer, criterion, range(2))
    record = optimizer.last_step
    kept = [record.losses, record.scores, record.weights, record.worst_off]
    assert {t.device.type for t in kept} == {DEVICE.type}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    """The scale leaves the weights alone, and a step that overflows leaves everything alone."""
    model = make("attending").float()
    optimizer, criterion = attach(model)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    weights = []
    for scale in (None, scaler):
        x, y = draw()
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=dtype):
            loss = criterion(model(x.float()), y)
        (loss if scale is None else scale.scale(loss)).backward()
        weights.append(optimizer.last_step.weights)
    assert reference.error(weights[1], weights[0]) < 0.05
    scaler.step(optimizer)
    scaler.update()
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    (scaler.scale(criterion(model(x.float()), y)) * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize("way", ["there", "back"])
def test_resumed_on_another_device(way: str) -> None:
    """Half on the one and half on the other is what the whole on one is."""
    first, second = (DEVICE, torch.device("cpu"))[:: 1 if way == "there" else -1]
    whole = make().to(first)
    train(whole, *attach(whole), range(6))
    half = make().to(first)
    optimizer, criterion = attach(half)
    train(half, optimizer, criterion, range(3))
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    other = make().to(second)
    other.load_state_dict(saved["model"])
    optimizer, criterion = attach(other)
    optimizer.load_state_dict(saved["optimizer"])
    train(other, optimizer, criterion, range(3, 6))
    for p, q in zip(whole.parameters(), other.parameters(), strict=True):
        assert reference.error(q.cpu(), p.cpu()) < 1e-9


def loader_of(x: Tensor, y: Tensor) -> DataLoader:
    """Batches in the host's memory, as a loader has them."""
    return DataLoader(TensorDataset(x.cpu(), y.cpu()), batch_size=4)


def test_global_weights() -> None:
    model, (x, y) = make(), draw(10)
    weights = global_weights(model, nn.CrossEntropyLoss(), loader_of(x, y), ALPHA, progress=False)
    losses = F.cross_entropy(model(x), y, reduction="none")
    oracle = reference.step(losses, model.parameters(), ALPHA)
    assert reference.error(weights.to(DEVICE), oracle.weights) < 1e-9


def test_a_global_scheme_resumes_on_the_host() -> None:
    x, y = draw(8)
    schemes = []
    for device in (DEVICE, torch.device("cpu")):
        model = make().to(device)
        optimizer, criterion = attach(model)
        scheme = GlobalScheme(optimizer, loader_of(x, y), refresh=2)
        if schemes:
            scheme.load_state_dict(schemes[0].state_dict())
        schemes.append(scheme)
        for inputs, targets in scheme:
            optimizer.zero_grad()
            criterion(model(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()
        assert optimizer.last_step.weights.device.type == device.type


def test_verify_leaves_the_generators_as_they_were() -> None:
    model, batch = make(), draw()
    module = torch.get_device_module(DEVICE)
    states = torch.get_rng_state(), module.get_rng_state()
    report = verify(model, *batch, nn.CrossEntropyLoss(), alpha=ALPHA)
    assert report.exact
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], module.get_rng_state())


class Pinned(Tensor):
    """Notes how it was moved."""

    moved: dict[str, object]

    def is_pinned(self) -> bool:
        return True

    def to(self, device: torch.device, **how: object) -> Tensor:
        type(self).moved = how
        return self


def test_pinned_memory_is_copied_without_waiting() -> None:
    _on(DEVICE, [torch.zeros(2, device="cpu").as_subclass(Pinned)])
    assert Pinned.moved == {"non_blocking": True}
