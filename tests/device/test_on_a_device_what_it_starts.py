"""How many kernels a step starts, and in which precision its products are: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import models
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from irw_optim import IRWOptimizer
from irw_optim.gradients.layers import _products

DEVICE = torch.get_default_device().type
B, LENGTH, WIDTH, CLASSES, ALPHA = 16, 8, 32, 4, 0.25

NO_KERNELS = {"_local_scalar_dense", "_unsafe_view", "detach", "lift_fresh", "resize_", "squeeze_"}
"""They are views, or allocate."""


class Started(TorchDispatchMode):
    """Counts kernels, without views and copies to the host, and multiplications by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.multiplied: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        there = any(isinstance(t, Tensor) and t.device.type == DEVICE for t in tree_leaves(out))
        if there and not function.is_view and name not in NO_KERNELS and "empty" not in name:
            self.kernels += 1
            count = flop_registry.get(function._overloadpacket)
            if count is not None:
                operand = next(t for t in tree_leaves(args) if isinstance(t, Tensor))
                work = count(*args, **(kwargs or {}), out_val=out)
                self.multiplied[operand.dtype] += work
        return out


class Block(nn.Module):
    """Attention and a hidden layer, as in GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.read, self.write = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hidden, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self.before(x)).chunk(3, -1)
        x = x + self.write((q @ k.mT / WIDTH**0.5).softmax(-1) @ v)
        return x + self.out(F.gelu(self.hidden(self.between(x))))


class Transformer(nn.Module):
    """A class for a sequence."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def mlp(*widths: int, **options: Any) -> nn.Module:
    layers = models.mlp(
        LENGTH * WIDTH, *(widths or (WIDTH, 24, 16)), CLASSES, act=nn.ReLU, **options
    )
    return nn.Sequential(nn.Flatten(), *layers)


mlp_of_three_maps = partial(mlp, WIDTH, 24)
wide_mlp = partial(mlp, 1024, 1024)  # whose rows are many numbers
mlp_with_layer_norm = partial(mlp, WIDTH, 24, norm=nn.LayerNorm)

four_groups = partial(nn.GroupNorm, 4)


def convolutional(norm: Callable[[int], nn.Module] = four_groups) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(LENGTH, 16, 3), norm(16), nn.ReLU(),
        nn.Conv1d(16, 16, 3), norm(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * (WIDTH - 4), CLASSES),
    )  # fmt: skip


def with_batch_norm() -> nn.Module:
    return convolutional(nn.BatchNorm1d)


class Residual(nn.Module):
    """Two convolutions with BatchNorm, and a way past them."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, wider, 3, padding=1, bias=False)
        self.second = nn.Conv1d(wider, wider, 3, padding=1, bias=False)
        self.past = nn.Conv1d(width, wider, 1, bias=False) if width != wider else nn.Identity()
        self.norms = nn.ModuleList(nn.BatchNorm1d(wider) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.past(x))


def residual() -> nn.Module:
    return nn.Sequential(
        Residual(LENGTH, 16), Residual(16, 16), Residual(16, 32), Residual(32, 32),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class Recurrent(nn.Module):
    """A class for a sequence, by the last state."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = layer(WIDTH, 24, batch_first=True), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def normalised_before(layer: type[nn.RNNBase]) -> nn.Module:
    """No quick products: the cells are pushed through."""
    return nn.Sequential(nn.BatchNorm1d(LENGTH), Recurrent(layer))


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, LENGTH, WIDTH)


def a_step(make: Callable[[], nn.Module], *, ours: bool, half: bool = False) -> Started:
    """What a step starts for which no comparison with autograd is due."""
    torch.manual_seed(0)
    model, criterion, x = make(), nn.CrossEntropyLoss(), inputs()
    y = torch.randint(CLASSES, (B,))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if ours:
        optimizer = IRWOptimizer(optimizer, alpha=ALPHA, model=model, criterion=criterion)
    for _ in range(6):
        with Started() as started:
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
                loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return started


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (mlp, 1.6),
        (mlp_of_three_maps, 1.8),
        (wide_mlp, 2.2),
        (mlp_with_layer_norm, 1.9),
        (Transformer, 1.4),
        (convolutional, 2.2),
        (with_batch_norm, 3.0),
        (residual, 2.7),
        (partial(Recurrent, nn.LSTM), 1.0),
        (partial(Recurrent, nn.GRU), 1.0),
        (partial(normalised_before, nn.LSTM), 3.0),
        (partial(normalised_before, nn.GRU), 2.9),
    ],
)
def test_kernels_of_a_step(make, times):
    ours, plain = a_step(make, ours=True).kernels, a_step(make, ours=False).kernels
    assert ours <= times * plain


def test_under_autocast_products_stay_in_half_precision():
    work = a_step(Transformer, ours=True, half=True).multiplied
    assert work[torch.float32] <= 0.05 * work[torch.bfloat16]
    assert set(work) <= {torch.float32, torch.bfloat16}


def weighed(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scores, weights and gradients of a step under autocast."""
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = criterion(model(x).float(), y)
        loss.backward()
    record = optimizer.last_step
    return record.scores, record.weights, [p.grad for p in model.parameters()]


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("make", [mlp, convolutional, lambda: Transformer(2)])
def test_products_in_half_precision_cost_no_more_than_the_model_in_it(make, monkeypatch):
    """A float64 loop is the truth, the same loop under autocast what bfloat16 itself costs."""
    torch.manual_seed(0)
    model, x = make(), inputs()
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[: B // 4] = logits[: B // 4].argmin(1)  # S is clear
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = F.cross_entropy(model(x).float(), y, reduction="none")
    by_loop = reference.step(losses, model.parameters(), ALPHA)
    scores, weights, gradients = weighed(model, x, y)
    monkeypatch.setattr(_products, "stays", lambda tensor: False)
    _, wide, _ = weighed(model, x, y)
    twin = make().double()
    twin.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    losses = F.cross_entropy(twin(x.double()), y, reduction="none")
    truth = reference.step(losses, twin.parameters(), ALPHA)

    assert scores.dtype == weights.dtype == torch.float32
    assert off(weights, truth.weights) <= 1.5 * off(by_loop.weights, truth.weights) + 1e-3
    assert off(weights, wide) <= off(by_loop.weights, truth.weights) + 1e-4
    clear = truth.scores.abs() > 0.1 * truth.scores.abs().max()
    assert torch.equal((scores > 0)[clear], (truth.scores > 0)[clear])
    for ours, loop, exact in zip(gradients, by_loop.gradients, truth.gradients, strict=True):
        if float(exact.norm()) > 0.01 * max(float(g.norm()) for g in truth.gradients):
            assert off(ours, exact) <= 1.5 * off(loop, exact) + 1e-3
