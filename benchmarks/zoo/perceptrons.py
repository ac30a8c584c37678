"""Small MLPs in the ways that people write them, and the five models of the table of step_cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.step_cost.models import TABLE, Work, mlp
from benchmarks.zoo.entry import Batch, Entry, rows

FEATURES = 24


class RawMLP(nn.Module):
    """Matrices of one's own."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.W1 = nn.Parameter(torch.randn(FEATURES, width) * 0.1)
        self.b1 = nn.Parameter(torch.zeros(width))
        self.W2 = nn.Parameter(torch.randn(width, 2) * 0.1)
        self.b2 = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W1 + self.b1) @ self.W2 + self.b2


def weight_norm_net() -> nn.Sequential:
    layers = [
        weight_norm(layer) if isinstance(layer, nn.Linear) else layer
        for layer in mlp(FEATURES, 128, 128, 2)
    ]
    return nn.Sequential(*layers)


def batch_norm_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip


def self_normalising() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in [(FEATURES, 128), (128, 128), (128, 128)]:
        layers += [nn.Linear(inputs, outputs), nn.SELU(), nn.AlphaDropout(0.05)]
    return nn.Sequential(*layers, nn.Linear(128, 2))


def _from_table(work: Work) -> Entry:
    """A row of the table of step_cost, whose batch has the size that its name says."""
    size = len(work.inputs())

    def batch(count: int) -> Batch:
        inputs = torch.cat([work.inputs() for _ in range(-(-count // size))])[:count]
        return (inputs,), torch.randint(work.classes, (count,))

    return Entry(work.name, "table of step_cost", size, work.model, batch)


ENTRIES = [
    Entry("MLP, weight norm", "tabular", 64, weight_norm_net, rows(FEATURES)),
    Entry("MLP, x @ self.W", "tabular", 64, RawMLP, rows(FEATURES)),
    Entry("MLP, BatchNorm, dropout", "tabular", 64, batch_norm_mlp, rows(FEATURES)),
    Entry("MLP, SELU, alpha dropout", "tabular", 64, self_normalising, rows(FEATURES)),
    Entry("MLP, one hidden layer", "tabular", 32, lambda: mlp(FEATURES, 32, 2), rows(FEATURES)),
    Entry("MLP, wide", "tabular", 64, lambda: mlp(FEATURES, 1024, 1024, 2), rows(FEATURES)),
    Entry("Logistic regression", "tabular", 32, lambda: nn.Linear(FEATURES, 2), rows(FEATURES)),
    *map(_from_table, TABLE),
]
