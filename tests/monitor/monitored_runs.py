"""Small trainings with a monitor: healthy ones, and ones that fail in a known way."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWOptimizer
from irw_optim.monitor import IRWMonitor
from irw_optim.schemes import GlobalScheme


def majority_and_minority(size: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Two features; for a fifth of the people, group 1, the second one counts the other way round.

    The third feature tells the groups apart, so that a small network can serve both.
    """
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(size, 3, generator=draw)
    group = (torch.rand(size, generator=draw) < 0.2).long()
    x[:, 2] = 2.0 * group - 1.0
    sign = torch.where(group == 1, -1.0, 1.0)
    y = (x[:, 0] + sign * x[:, 1] > 0).long()
    return x, y, group


def mlp(features: int = 3, classes: int = 2, hidden: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return models.mlp(features, hidden, classes, act=nn.ReLU)


def train(
    data: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    model: nn.Module | None = None,
    criterion: nn.Module | None = None,
    epochs: int = 10,
    batch: int = 50,
    lr: float = 0.02,
    scheme: dict[str, Any] | None = None,
    monitor: dict[str, Any] | None = None,
    tell_groups: bool = True,
    **options: Any,
) -> IRWMonitor:
    """Train on (x, y, group) and return the monitor that listened."""
    x, y, group = majority_and_minority() if data is None else data
    model = mlp(x.shape[1]) if model is None else model
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        **{"alpha": 0.3, "model": model, "criterion": criterion, **options},
    )
    listener = IRWMonitor(optimizer, **(monitor or {}))
    order = torch.Generator().manual_seed(3)
    loader: Any = DataLoader(
        TensorDataset(x, y, group), batch_size=batch, shuffle=True, generator=order
    )
    if scheme is not None:
        loader = GlobalScheme(
            optimizer, loader, forward=lambda net, given: (net(given[0]), given[1]), **scheme
        )
    for _ in range(epochs):
        for inputs, target, groups in loader:
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            if tell_groups:
                listener.groups(groups)
            optimizer.step()
    return listener
