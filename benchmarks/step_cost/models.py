"""The work that is timed: models and batches of the usual kinds and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """One row of the table: a model, its batch, and how long a plain step roughly takes."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    classes: int
    inner: int = 1

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and random class labels, always the same."""
        torch.manual_seed(1)
        inputs = self.inputs()
        return inputs, torch.randint(0, self.classes, (len(inputs),))

    def build(self) -> nn.Module:
        """The model, always with the same parameters."""
        torch.manual_seed(0)
        return self.model()


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Three convolutions with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Transformer(nn.Module):
    """Token and position embeddings, encoder layers, a mean over the positions."""

    def __init__(self, width: int, length: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        self.positions = nn.Parameter(torch.randn(1, length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.tokens(tokens) + self.positions)
        return self.head(hidden.mean(1))  # type: ignore[no-any-return]


def small_mlp(batch: int) -> Work:
    """The MLP of the paper's tables, at some batch size."""
    inner = max(1, 2000 // batch)
    return Work(
        f"MLP 100-64-32-2, B = {batch}",
        lambda: mlp(100, 64, 32, 2),
        lambda: torch.randn(batch, 100),
        2,
        inner,
    )


def transformer(width: int, length: int, layers: int, batch: int) -> Work:
    """A transformer classifier."""
    return Work(
        f"Transformer, {layers} layers, d = {width}, T = {length}, B = {batch}",
        lambda: Transformer(width, length, layers),
        lambda: torch.randint(0, 1000, (batch, length)),
        2,
    )


TABLE = [
    small_mlp(64),
    small_mlp(1024),
    Work(
        "MLP 512-1024-1024-512-2, B = 256",
        lambda: mlp(512, 1024, 1024, 512, 2),
        lambda: torch.randn(256, 512),
        2,
    ),
    Work("CNN, 3 conv + GroupNorm, 32x32, B = 64", cnn, lambda: torch.randn(64, 3, 32, 32), 10),
    transformer(256, 64, 4, 16),
]

BATCHES = [64, 256, 1024, 4096, 16384]
LENGTHS = [64, 128, 256, 512, 1024]
