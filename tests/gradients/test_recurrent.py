"""Recurrent layers in kernels whose backward pass has no derivative, as cuDNN's are."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from irw_optim import IRWOptimizer, verify
from irw_optim.gradients.autodiff import AutodiffGradients

ALPHA = 0.4


class CudnnRnn(torch.autograd.Function):
    """Named as autograd names cuDNN's."""

    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            output = ctx.run(x.detach())
        return None, None, *torch.autograd.grad(output, parameters, gradient)


class Fused(nn.GRU):
    """As on a GPU: cuDNN's kernel wherever the flag allows it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        run = super().forward
        if not torch.backends.cudnn.enabled:
            return run(x)[0]
        return CudnnRnn.apply(lambda x: run(x)[0], x, *self.parameters())


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Fused(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[:, -1])


def test_only_the_first_step_goes_row_by_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "irw_optim")
    rows: list[int] = []
    row = AutodiffGradients._row
    monkeypatch.setattr(
        AutodiffGradients, "_row", lambda self, sample: rows.append(sample) or row(self, sample)
    )
    torch.manual_seed(0)
    model, criterion = Reader().double(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA, model=model, criterion=criterion
    )
    taken = []
    for _ in range(4):
        x, y = torch.randn(5, 6, 4, dtype=torch.float64), torch.randint(2, (5,))
        with torch.backends.cudnn.flags(enabled=False):
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
            oracle = reference.step(losses, model.parameters(), ALPHA)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
            assert reference.error(p.grad, gradient) < 1e-9
        optimizer.step()
        taken.append(len(rows))
    assert taken == [5, 5, 5, 5]
    assert sum("own kernels from now on" in record.message for record in caplog.records) == 1
    assert torch.backends.cudnn.enabled
    optimizer.detach()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "frozen", [None, "bias_ih_l0", "bias_hh_l0", "weight_ih_l0", "weight_hh_l0"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=str,
)
def test_an_lstm_in_one_operation_has_quick_products(options, frozen):
    """Which the CPU has in float32; products that a comparison found wrong would be autograd's."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(5, 6, **options)
            self.head = nn.Linear(6 * (1 + self.layer.bidirectional), 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if self.layer.batch_first else x.transpose(0, 1)
            states = self.layer(x)[0]
            return self.head(states.mean(1 if self.layer.batch_first else 0))

    torch.manual_seed(0)
    model = Tagger()
    for name, p in model.layer.named_parameters():
        p.requires_grad_(name != frozen)
    x, y = torch.randn(8, 4, 5), torch.randint(3, (8,))
    found = verify(model, x, y, nn.CrossEntropyLoss(), repeats=1)
    assert found.exact
    assert set(found.engines.values()) == {"ghost"}


class Stack(nn.Module):
    """LSTMs on the way from a table to the losses, joined in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        both, layers = way == "both directions", 1 + (way == "two layers")
        settings: dict[str, Any] = {"batch_first": True, "bidirectional": both}
        self.table = nn.Embedding(7, 6)
        self.first = nn.LSTM(6, 6, layers, **settings)
        self.between = nn.Linear(6 * (1 + both), 6)
        self.second = nn.LSTM(6, 6, **settings)
        self.head = nn.Linear(6 * (1 + both), 7)
        if way == "tied table":
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        way, read = self.way, self.table(tokens)
        states, (last, cell) = self.first(read)
        if way == "last cell":
            states = states * cell[-1].unsqueeze(1)
        if way == "states unread":
            states = last[-1].unsqueeze(1).expand_as(states)
        hidden = self.between(states).tanh()
        if way == "residual":
            hidden = hidden + read
        start = (last, cell) if way == "handed states" else None
        found = self.second(hidden, start)[0]
        return self.head(found.mean(1) + (last[-1] if way == "last state" else 0))


IN_ROUNDS = ["plain", "two layers", "both directions", "last cell", "states unread", "tied table"]
AT_ONCE = ["residual", "handed states", "last state"]


class Backwards(TorchDispatchMode):
    """Counts how often autograd goes back through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += "rnn_layer_backward" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [*IN_ROUNDS, *AT_ONCE])
def test_an_lstm_hands_back_the_gradient_of_its_input(way):
    """So that autograd's kernel, which makes all its gradients anew, is not run for this one."""
    torch.manual_seed(0)
    model, criterion = Stack(way), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA, model=model, criterion=criterion
    )
    for step in range(1, 8):
        tokens, y = torch.randint(7, (6, 5)), torch.randint(7, (6,))
        losses = nn.functional.cross_entropy(model(tokens), y, reduction="none")
        oracle = reference.step(losses, model.parameters(), ALPHA)
        optimizer.zero_grad()
        loss = criterion(model(tokens), y)
        with Backwards() as backwards:
            loss.backward()
        for p, gradient in zip(model.parameters(), oracle.gradients, strict=True):
            assert reference.error(p.grad, gradient) < 1e-4
        optimizer.step()
        if step in (5, 6):  # no check is due
            assert not backwards.count or way in AT_ONCE
