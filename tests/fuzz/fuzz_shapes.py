"""Chains of operations on cubes (n, n, n), in which the batch may be any dimension, and get lost.

Where all sizes coincide nothing but the operations says which dimension holds the samples: a chain
that turns the cube once too often reads positions as samples, and mixes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_nets import alone
from fuzz_trials import Draw, Trial
from torch import Tensor, nn

Step = Callable[[Any, Tensor, int], Tensor]
"""From the chain's layers, a cube and one of its dimensions."""


def along(dim: int) -> list[int]:
    """The shape of a vector along one dimension of a cube."""
    return [-1 if d == dim else 1 for d in range(3)]


def folded(chain: Any, x: Tensor, dim: int) -> Tensor:
    """Two dimensions as one, in front or behind."""
    n = len(x)
    if dim == 0:
        return chain.layers[0](x.reshape(n * n, n)).view(n, n, n)
    if dim == 1:
        return chain.wide(x.reshape(n, n * n)).view(n, n, n)
    return chain.layers[1](x.transpose(0, 1).reshape(-1, n)).view(n, n, n).transpose(0, 1)


def convolved(chain: Any, x: Tensor, dim: int) -> Tensor:
    return chain.convolution(x.movedim(0, dim)).movedim(dim, 0)


def normed(chain: Any, x: Tensor, dim: int) -> Tensor:
    return chain.norm(x.movedim(-1, dim)).movedim(dim, -1)


def products(chain: Any, x: Tensor, dim: int) -> Tensor:
    other = (x.transpose(0, 1), x.transpose(1, 2), x.transpose(0, 2))[dim]
    return 0.3 * x @ other


def recurrent(chain: Any, x: Tensor, dim: int) -> Tensor:
    chain.cell.batch_first = dim > 0
    return chain.cell(x)[0]


def attention(chain: Any, x: Tensor, dim: int) -> Tensor:
    q = x if dim else x.transpose(0, 1)
    out = F.scaled_dot_product_attention(q, q, x)
    return out if dim else out.transpose(0, 1)


def einsum(chain: Any, x: Tensor, dim: int) -> Tensor:
    equation = ("btd,de->bte", "btd,te->bed", "btd,be->etd")[dim]
    return torch.einsum(equation, x, chain.weight)


def looked_up(chain: Any, x: Tensor, dim: int) -> Tensor:
    return x + chain.table(torch.arange(len(x))).view(along(dim))


CHAIN: dict[str, Step] = {
    "linear": lambda chain, x, dim: chain.layers[dim](x),
    "matrix": lambda chain, x, dim: (x.movedim(-1, dim) @ chain.weight).movedim(dim, -1),
    "from the left": lambda chain, x, dim: chain.weight @ x,
    "einsum": einsum,
    "vector": lambda chain, x, dim: x * chain.vector.view(along(dim)),
    "table": looked_up,
    "norm": normed,
    "convolution": convolved,
    "recurrent": recurrent,
    "attention": attention,
    "folded": folded,
    "transpose": lambda chain, x, dim: x.transpose(dim, (dim + 1) % 3),
    "permute": lambda chain, x, dim: x.permute(1, 2, 0) if dim else x.permute(2, 1, 0),
    "there and back": lambda chain, x, dim: chain.layers[0](x.movedim(0, dim)).movedim(dim, 0),
    "turned": lambda chain, x, dim: x.transpose(0, dim).reshape(x.shape),
    "roll": lambda chain, x, dim: x.roll(1, dim),
    "flip": lambda chain, x, dim: x.flip(dim),
    "softmax": lambda chain, x, dim: x.softmax(dim),
    "cumsum": lambda chain, x, dim: 0.5 * x.cumsum(dim),
    "centred": lambda chain, x, dim: x - x.mean(dim, keepdim=True),
    "largest": lambda chain, x, dim: x - x.amax(dim, keepdim=True),
    "sum": lambda chain, x, dim: x + 0.2 * x.sum(dim).unsqueeze(dim),
    "sum elsewhere": lambda chain, x, dim: x + 0.2 * x.sum(dim),
    "unbound": lambda chain, x, dim: torch.stack(x.unbind(dim), 0),
    "stacked": lambda chain, x, dim: torch.stack(x.unbind(0), dim),
    "split": lambda chain, x, dim: torch.cat(x.split(1, dim)[::-1], dim),
    "selected": lambda chain, x, dim: x + x.select(dim, 0),
    "indexed": lambda chain, x, dim: x.index_select(dim, torch.arange(len(x)).roll(1)),
    "products": products,
    "padded": lambda chain, x, dim: F.pad(x, (1, 0))[..., :-1] if dim else x[:, :, ::1],
    "expanded": lambda chain, x, dim: x + x.mean(dim, keepdim=True).expand_as(x),
    "symmetric": lambda chain, x, dim: x + x.transpose(dim, (dim + 1) % 3),
    "tanh": lambda chain, x, dim: x.tanh(),
}


class Chain(nn.Module):
    """The steps, each along a dimension, with one set of layers for all."""

    def __init__(self, steps: tuple[tuple[str, int], ...], n: int) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(n, n) for _ in range(3))
        self.wide = nn.Linear(n * n, n * n)
        self.norm, self.convolution = nn.LayerNorm(n), nn.Conv1d(n, n, 1)
        self.cell, self.table = nn.GRU(n, n), nn.Embedding(n, 1)
        self.weight, self.vector = nn.Parameter(torch.randn(n, n)), nn.Parameter(torch.randn(n))

    def forward(self, x):
        for step, dim in self.steps:
            x = CHAIN[step](self, x, dim)
        return x


def shapes(draw: Draw, name: str) -> Trial:
    """A chain with one operation among others."""
    n = draw.pick(2, 3, 4)
    names = [name] + [draw.pick(*CHAIN) for _ in range(draw.pick(1, 2, 3, 4))]
    draw.shuffle(names)
    steps = (("linear", 0), *((step, draw.randrange(3)) for step in names), ("linear", 1))
    samples = draw.pick(0, 0, 0, 1, 2)
    engine = draw.pick("auto", "auto", "auto", "auto", "ghost")

    def run(user: Any, x: Tensor) -> None:
        out = user.net(x).movedim(samples, 0)
        user.of_each((out - 0.5).square().flatten(1).mean(1))

    return Trial(
        story=f"n = {n}, {steps}, samples at {samples}, engine {engine!r}",
        world=partial(alone, partial(Chain, steps, n)),
        batch=lambda number: torch.randn(n, n, n, dtype=torch.float64),
        loop=run,
        options={"alpha": draw.pick(0.3, 0.5), "engine": engine},
        seed=draw.seed_of_tensors,
        steps=3,
    )
