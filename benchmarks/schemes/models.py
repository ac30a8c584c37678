"""The small models of this folder's benchmarks, and what is measured of a trained one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.schemes.data import Split

SMALLEST_CELL = 50
"""Samples that a group needs, to count for the worst one: fewer say little."""


def mlp(inputs: int, *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 2))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Transformer(nn.Module):
    """Token embeddings, two encoder layers, the mean over the tokens, a linear head."""

    def __init__(self, tokens: int, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    training = model.training
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(4096)])
    model.train(training)
    return outputs


def evaluate(outputs: Tensor, split: Split, alpha: float = 0.3) -> dict[str, float]:
    """Accuracy; the worst one of each grouping (cells of 50 samples and more); losses."""
    losses = nn.functional.cross_entropy(outputs, split.y, reduction="none")
    right = (outputs.argmax(1) == split.y).double()
    tail = losses.sort(descending=True).values[: int(alpha * len(split))]
    worst = {
        f"worst {name}": min(
            float(right[codes == cell].mean())
            for cell in codes.unique()
            if (codes == cell).sum() >= SMALLEST_CELL
        )
        for name, codes in (split.groups | {"class": split.y}).items()
    }
    return {
        "accuracy": float(right.mean()),
        **worst,
        "mean loss": float(losses.mean()),
        "tail loss": float(tail.mean()),
    }
