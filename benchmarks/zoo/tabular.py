"""Tables: MLPs in the ways people write them, embeddings of numbers, gates, trees, attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.models import TABLE, Work, mlp
from benchmarks.zoo.blocks import Apply, Make, Skip
from benchmarks.zoo.entry import Batch, Entry, rows

FEATURES = 24


class Periodic(nn.Module):
    """PLR: sines of learned frequencies, a linear map for each feature, ReLU."""

    def __init__(self, waves: int = 24, width: int = 16) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(FEATURES, waves) * 0.1)
        self.weight = nn.Parameter(torch.randn(FEATURES, 2 * waves, width) * waves**-0.5)
        self.bias = nn.Parameter(torch.zeros(FEATURES, width))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * self.frequencies * x[..., None]
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return F.relu((waves[..., None, :] @ self.weight).squeeze(-2) + self.bias)


class PiecewiseLinear(nn.Module):
    """How far a number is through each bin of its feature, mapped linearly for each feature."""

    def __init__(self, bins: int = 12, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("edges", torch.linspace(-2, 2, bins + 1))
        self.weight = nn.Parameter(torch.randn(FEATURES, bins, width) * bins**-0.5)
        self.bias = nn.Parameter(torch.zeros(FEATURES, width))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.edges[:-1], self.edges[1:]
        through = ((x[..., None] - left) / (right - left)).clamp(0, 1)
        return torch.einsum("bfk,fkw->bfw", through, self.weight) + self.bias


def embedded(embedding: nn.Module) -> nn.Sequential:
    return nn.Sequential(embedding, nn.Flatten(), mlp(FEATURES * 16, 128, 128, 2))


class FeatureTokens(nn.Module):
    """FT-Transformer's tokens: a vector a feature, times its value, and a class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(FEATURES, width) * 0.1) for _ in range(2)
        )
        self.token = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.weight + self.bias
        return torch.cat([self.token.expand(len(x), 1, -1), tokens], 1)


def ft_transformer(width: int = 64, depth: int = 2) -> nn.Sequential:
    tokens, sizes = FeatureTokens(width), (width, 4, 2 * width, 0.1)
    layer = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(tokens, body, Apply(lambda x: x[:, 0]), nn.ReLU(), nn.Linear(width, 2))


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


def glu(inputs: int, outputs: int) -> nn.Sequential:
    """TabNet's unit: a linear map, ghost batch norm, half of it gates the other."""
    linear = nn.Linear(inputs, 2 * outputs, bias=False)
    return nn.Sequential(linear, GhostBatchNorm(2 * outputs), nn.GLU())


class TabNet(nn.Module):
    """Steps that choose features by a mask, and share their first unit."""

    def __init__(self, width: int = 32, steps: int = 3) -> None:
        super().__init__()
        self.norm, self.shared = nn.BatchNorm1d(FEATURES), glu(FEATURES, width)
        self.units = nn.ModuleList([glu(width, width) for _ in range(steps)])
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


def residual_rows(width: int = 128) -> nn.Sequential:
    """Residual MLP blocks with BatchNorm and PReLU."""

    def block() -> Skip:
        widen, act, drop = nn.Linear(width, 2 * width), nn.PReLU(2 * width), nn.Dropout(0.1)
        return Skip(nn.BatchNorm1d(width), widen, act, drop, nn.Linear(2 * width, width))

    blocks = [block() for _ in range(3)]
    return nn.Sequential(nn.Linear(FEATURES, width), *blocks, nn.PReLU(), nn.Linear(width, 2))


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


# MLPs ------------------------------------------------------------------------------------------


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
    model = mlp(FEATURES, 128, 128, 2)
    for layer in model[::2]:
        weight_norm(layer)
    return model


def batch_norm_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip


def self_normalising() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (FEATURES, 128, 128):
        layers += [nn.Linear(inputs, 128), nn.SELU(), nn.AlphaDropout(0.05)]
    return nn.Sequential(*layers, nn.Linear(128, 2))


def of_rows(name: str, size: int, model: Make) -> Entry:
    return Entry(name, "tabular", size, model, rows(FEATURES))


def from_table(work: Work) -> Entry:
    """A row of the table of step_cost, whose batch has the size that its name says."""
    size = len(work.inputs())

    def batch(count: int) -> Batch:
        inputs = torch.cat([work.inputs() for _ in range(-(-count // size))])[:count]
        return (inputs,), torch.randint(work.classes, (count,))

    return Entry(work.name, "table of step_cost", size, work.model, batch)


ENTRIES = [
    of_rows("PLR embeddings", 64, lambda: embedded(Periodic())),
    of_rows("Piecewise-linear embeddings", 64, lambda: embedded(PiecewiseLinear())),
    of_rows("FT-Transformer", 32, ft_transformer),
    of_rows("SAINT, rows meet", 32, Saint),
    of_rows("TabNet, ghost BatchNorm", 64, TabNet),
    of_rows("Tabular ResNet, PReLU", 64, residual_rows),
    of_rows("NODE, soft trees", 64, Trees),
    of_rows("TabM, shared ensemble", 64, Ensemble),
    Entry("DCN, categories", "tabular", 64, Cross, numbers_and_categories),
    of_rows("Mixture of experts", 64, Experts),
    of_rows("MLP, weight norm", 64, weight_norm_net),
    of_rows("MLP, x @ self.W", 64, RawMLP),
    of_rows("MLP, BatchNorm, dropout", 64, batch_norm_mlp),
    of_rows("MLP, SELU, alpha dropout", 64, self_normalising),
    of_rows("MLP, one hidden layer", 32, lambda: mlp(FEATURES, 32, 2)),
    of_rows("MLP, wide", 64, lambda: mlp(FEATURES, 1024, 1024, 2)),
    of_rows("Logistic regression", 32, lambda: nn.Linear(FEATURES, 2)),
    *map(from_table, TABLE),
]
