"""Tables: embeddings of numbers, gates, trees and attention over features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import mlp
from benchmarks.zoo.entry import Batch, Entry, rows

FEATURES = 24


class Periodic(nn.Module):
    """PLR: sines of learned frequencies, a linear map for each feature, ReLU."""

    def __init__(self, features: int = FEATURES, waves: int = 24, width: int = 16) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(features, waves) * 0.1)
        self.weight = nn.Parameter(torch.randn(features, 2 * waves, width) * waves**-0.5)
        self.bias = nn.Parameter(torch.zeros(features, width))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * self.frequencies * x[..., None]
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return F.relu((waves[..., None, :] @ self.weight).squeeze(-2) + self.bias)


class PiecewiseLinear(nn.Module):
    """How far a number is through each bin of its feature, mapped linearly for each feature."""

    def __init__(self, features: int = FEATURES, bins: int = 12, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("edges", torch.linspace(-2, 2, bins + 1))
        self.weight = nn.Parameter(torch.randn(features, bins, width) * bins**-0.5)
        self.bias = nn.Parameter(torch.zeros(features, width))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.edges[:-1], self.edges[1:]
        through = ((x[..., None] - left) / (right - left)).clamp(0, 1)
        return torch.einsum("bfk,fkw->bfw", through, self.weight) + self.bias


def embedded(embedding: nn.Module) -> nn.Sequential:
    return nn.Sequential(embedding, nn.Flatten(), mlp(FEATURES * 16, 128, 128, 2))


class FeatureTokens(nn.Module):
    """FT-Transformer's tokens: a vector a feature, times its value, and a class token."""

    def __init__(self, width: int, features: int = FEATURES) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, width) * 0.1)
        self.bias = nn.Parameter(torch.randn(features, width) * 0.1)
        self.token = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.weight + self.bias
        return torch.cat([self.token.expand(len(x), 1, -1), tokens], 1)


class FTTransformer(nn.Module):
    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens = FeatureTokens(width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.1, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.tokens(x))[:, 0]))


class Saint(nn.Module):
    """Attention over the features of a row, then over the rows of the batch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens, flat = FeatureTokens(width), width * (FEATURES + 1)
        self.columns = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.norm, self.rows = nn.LayerNorm(flat), nn.MultiheadAttention(flat, 4, batch_first=True)
        self.head = nn.Linear(flat, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.columns(self.tokens(x)).flatten(1)
        normed = self.norm(x)[None]
        return self.head(x + self.rows(normed, normed, normed, need_weights=False)[0][0])


class GhostBatchNorm(nn.Module):
    """BatchNorm inside parts of the batch."""

    def __init__(self, width: int, part: int = 16) -> None:
        super().__init__()
        self.part, self.norm = part, nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(self.part)])


class GLU(nn.Module):
    """TabNet's unit: a linear map, ghost batch norm, half of it gates the other."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs, bias=False)
        self.norm = GhostBatchNorm(2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.norm(self.linear(x)))


class TabNet(nn.Module):
    """Steps that choose features by a mask, and share their first unit."""

    def __init__(self, width: int = 32, steps: int = 3) -> None:
        super().__init__()
        self.norm, self.shared = nn.BatchNorm1d(FEATURES), GLU(FEATURES, width)
        self.units = nn.ModuleList([GLU(width, width) for _ in range(steps)])
        self.masks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, FEATURES), GhostBatchNorm(FEATURES))
            for _ in range(steps)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        hidden, prior, total = self.shared(x), torch.ones_like(x), 0
        for unit, choose in zip(self.units, self.masks, strict=True):
            mask = (choose(hidden) * prior).softmax(1)
            prior = prior * (1.3 - mask)
            shared = self.shared(mask * x)
            hidden = (shared + unit(shared)) * math.sqrt(0.5)
            total = total + F.relu(hidden)
        return self.head(total)


class ResidualRows(nn.Module):
    """A residual MLP block with BatchNorm and PReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm1d(width), nn.PReLU(2 * width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.drop(self.act(self.widen(self.norm(x)))))


def residual_rows() -> nn.Sequential:
    blocks = [ResidualRows(128) for _ in range(3)]
    return nn.Sequential(nn.Linear(FEATURES, 128), *blocks, nn.PReLU(), nn.Linear(128, 2))


class Trees(nn.Module):
    """NODE: differentiable oblivious trees, their features chosen by a softmax."""

    def __init__(self, trees: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.choice = nn.Parameter(torch.randn(FEATURES, trees, depth))
        self.threshold = nn.Parameter(torch.randn(trees, depth))
        self.temperature = nn.Parameter(torch.zeros(trees, depth))
        self.leaves = nn.Parameter(torch.randn(trees, 2**depth, 2) * 0.1)
        bits = torch.arange(2**depth)[:, None] >> torch.arange(depth) & 1
        self.register_buffer("bits", bits.bool())

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.einsum("bf,ftd->btd", x, self.choice.softmax(0))
        right = ((chosen - self.threshold) * self.temperature.exp()).sigmoid()[:, :, None]
        reach = torch.where(self.bits, right, 1 - right).prod(-1)
        return torch.einsum("btl,tlc->bc", reach, self.leaves)


class Ensemble(nn.Module):
    """TabM: one MLP for all members, each with scales and biases of its own."""

    def __init__(self, members: int = 8, width: int = 96) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, width), nn.Linear(width, width)
        self.enter = nn.Parameter(1 + 0.1 * torch.randn(members, FEATURES))
        self.between = nn.Parameter(1 + 0.1 * torch.randn(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))
        self.heads = nn.Parameter(torch.randn(members, width, 2) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x[:, None] * self.enter))
        x = F.relu(self.second(x * self.between) + self.bias)
        return torch.einsum("bmw,mwc->bmc", x, self.heads).mean(1)


class Cross(nn.Module):
    """DCN: explicit products of features beside an MLP, over embedded categories."""

    def __init__(self, columns: int = 8, width: int = 8) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(50, width) for _ in range(columns)])
        flat = columns * width + FEATURES
        self.cross = nn.ModuleList([nn.Linear(flat, flat) for _ in range(2)])
        self.deep = mlp(flat, 128, 64)
        self.head = nn.Linear(flat + 64, 2)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        parts = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        first = x = torch.cat([numbers, *parts], 1)
        for layer in self.cross:
            x = first * layer(x) + x
        return self.head(torch.cat([x, self.deep(first)], 1))


def numbers_and_categories(size: int) -> Batch:
    (numbers,), classes = rows(FEATURES)(size)
    return (numbers, torch.randint(50, (size, 8))), classes


class Experts(nn.Module):
    """A soft mixture of experts."""

    def __init__(self, experts: int = 4, width: int = 128) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, experts)
        self.experts = nn.ModuleList([mlp(FEATURES, width, width, 2) for _ in range(experts)])

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).softmax(1)[..., None] * answers).sum(1)


ENTRIES = [
    Entry("PLR embeddings", "tabular", 64, lambda: embedded(Periodic()), rows(FEATURES)),
    Entry("Piecewise-linear embeddings", "tabular", 64,
          lambda: embedded(PiecewiseLinear()), rows(FEATURES)),
    Entry("FT-Transformer", "tabular", 32, FTTransformer, rows(FEATURES)),
    Entry("SAINT, rows meet", "tabular", 32, Saint, rows(FEATURES)),
    Entry("TabNet, ghost BatchNorm", "tabular", 64, TabNet, rows(FEATURES)),
    Entry("Tabular ResNet, PReLU", "tabular", 64, residual_rows, rows(FEATURES)),
    Entry("NODE, soft trees", "tabular", 64, Trees, rows(FEATURES)),
    Entry("TabM, shared ensemble", "tabular", 64, Ensemble, rows(FEATURES)),
    Entry("DCN, categories", "tabular", 64, Cross, numbers_and_categories),
    Entry("Mixture of experts", "tabular", 64, Experts, rows(FEATURES)),
]  # fmt: skip
