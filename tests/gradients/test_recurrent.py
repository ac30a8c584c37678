"""Recurrent layers in kernels whose backward pass has no derivative, as cuDNN's are."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from irw_optim import IRWOptimizer
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
