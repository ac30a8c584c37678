"""Blocks that random models are made of: each keeps the kind of its input, and may be nested.

Kinds of tensors, all with the batch first:

    vector     (B, d)
    sequence   (B, T, d)
    map1..3    (B, d, L), (B, d, L, L), (B, d, L, L, L)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

LONGEST = 16
"""Positions that a table of positions has."""


class Wrapped(nn.Module):
    """A block inside another."""

    def __init__(self, *makers) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(make() for make in makers))


class Residual(Wrapped):
    def forward(self, x):
        return x + self.inner(x)


class ResidualInPlace(Wrapped):
    def forward(self, x):
        h = self.inner(x)
        h += x
        h.mul_(0.5)
        return h


class Twice(Wrapped):
    """The same parameters at two depths."""

    def forward(self, x):
        return self.inner(self.inner(x).tanh())


class Checkpointed(Wrapped):
    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Unused(Wrapped):
    """Computed, and thrown away."""

    def forward(self, x):
        self.inner(x)
        return x


class ByKeyword(Wrapped):
    def forward(self, x):
        return self.inner[0](input=x)


class NormInEval(Wrapped):
    """BatchNorm or InstanceNorm by its running statistics, while the rest trains."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.inner.eval()
        return self

    def forward(self, x):
        return self.inner(x)


# Parameters that modules use themselves ---------------------------------------------------------


class Direct(nn.Module):
    """A parameter of this shape, added, multiplied or matrix-multiplied."""

    def __init__(self, operation: str, *shape: int) -> None:
        super().__init__()
        self.operation = operation
        self.p = nn.Parameter(torch.randn(shape) * 0.5)

    def forward(self, x):
        p = self.p
        if self.operation == "add":
            return x + p
        if self.operation == "add to":
            return p + x
        if self.operation == "multiply":
            return x * p
        if self.operation == "multiply to":
            return p * x
        if self.operation == "subtract":
            return x - p
        if self.operation == "divide":
            return x / (2 + p.square())
        if self.operation == "temperature":
            return x * p.exp()
        if self.operation == "in place":
            x = x * 1
            x += p
            return x
        return x @ p if self.operation == "matrix" else torch.einsum("...i,ij->...j", x, p)


class Functional(nn.Module):
    """A child's weight used without calling the child, or besides."""

    def __init__(self, width: int, also_called: bool) -> None:
        super().__init__()
        self.child, self.also_called = nn.Linear(width, width), also_called

    def forward(self, x):
        h = self.child(x).tanh() if self.also_called else x
        return F.linear(h, self.child.weight)


class TiedPair(nn.Module):
    """Two layers with one weight, the second transposed or not."""

    def __init__(self, width: int, transposed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.transposed = transposed

    def forward(self, x):
        h = self.first(x).tanh()
        return F.linear(h, self.second.weight.T) if self.transposed else self.second(h)


class LoRA(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 1, bias=False), nn.Linear(1, width, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


class Bilinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.form = nn.Bilinear(width, width, width)

    def forward(self, x):
        return self.form(x, x.flip(-1))


# Samples that see each other --------------------------------------------------------------------


class Centred(Wrapped):
    def forward(self, x):
        h = self.inner(x)
        return h - h.mean(0)


class BatchAttention(Wrapped):
    def forward(self, x):
        h = self.inner(x)
        return (h @ h.T).softmax(1) @ h


class Experts(nn.Module):
    """Each sample goes through one of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        chosen = x[:, 0] > 0
        out = torch.empty_like(x)
        out[chosen], out[~chosen] = self.left(x[chosen]), self.right(x[~chosen])
        return out


# Sequences --------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Learned positions, looked up in one of the usual ways."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how = how
        if how.startswith("parameter"):
            shape = (LONGEST, width) if how.endswith("(T, d)") else (1, LONGEST, width)
            self.table = nn.Parameter(torch.randn(shape) * 0.3)
        else:
            self.table = nn.Embedding(LONGEST, width)

    def forward(self, x):
        if self.how == "parameter (T, d)":
            return x + self.table[: x.shape[1]]
        if self.how == "parameter (1, T, d)":
            return x + self.table[:, : x.shape[1]]
        index = torch.arange(x.shape[1])
        if self.how == "(T, d)":
            return x + self.table(index)
        if self.how == "(1, T, d)":
            return x + self.table(index[None])
        return x + self.table(index.expand(len(x), -1))


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class TimeFirst(Wrapped):
    """(T, B, d) inside."""

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Folded(Wrapped):
    """(B T, d) inside, or (T B, d)."""

    def __init__(self, time_first: bool, *makers) -> None:
        super().__init__(*makers)
        self.time_first = time_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_first else x
        h = self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return h.transpose(0, 1) if self.time_first else h


class AsMap(Wrapped):
    """(B, d, T) inside."""

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, kind: str, width: int, how: str, layers: int, both_ways: bool) -> None:
        super().__init__()
        hidden = width // 2 if both_ways else width
        self.cell = getattr(nn, kind)(
            width,
            hidden,
            num_layers=layers,
            bidirectional=both_ways,
            batch_first=how != "time first",
            dropout=0.2 if layers > 1 else 0.0,
        )
        self.how = how

    def forward(self, x):
        if self.how == "time first":
            return self.cell(x.transpose(0, 1))[0].transpose(0, 1)
        if self.how == "packed":
            lengths = (torch.arange(len(x)) % x.shape[1] + 1).flip(0)
            lengths[:1] = x.shape[1]
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]
        return self.cell(x)[0]


class Unrolled(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(width, width)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return (state[0] if isinstance(state, tuple) else state)[:, None].expand_as(x)


class Attention(nn.Module):
    def __init__(self, width: int, batch_first: bool, weights: bool, cross: bool, **options):
        super().__init__()
        if cross:
            options = {**options, "kdim": 3, "vdim": width}
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first, **options)
        self.weights, self.cross = weights, cross

    def forward(self, x):
        h = x if self.attention.batch_first else x.transpose(0, 1)
        key = h[..., :1].expand(*h.shape[:-1], 3).sin() if self.cross else h
        out = self.attention(h, key, h, need_weights=self.weights)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


class FusedAttention(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(width, 3 * width), causal

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(width, 2, 5, 0.1, batch_first=True)

    def forward(self, x):
        return self.layer(x, x.flip(1))


# From the input to the first block, and from the last to the output -------------------------------


class Pool(nn.Module):
    """To (B, d)."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__()
        self.dims = (1,) if kind == "sequence" else (2, 3, 4)[: int(kind[-1])]
        self.how = how

    def forward(self, x):
        if self.how == "mean":
            return x.mean(self.dims)
        if self.how == "largest":
            return x.amax(self.dims)
        return x[:, -1] if self.dims == (1,) else x.flatten(2)[..., -1]


class Model(nn.Module):
    """Input layer, blocks and head; ``tied`` lets the head share the embedding's matrix."""

    def __init__(self, start, blocks, head, tied: bool) -> None:
        super().__init__()
        self.start = nn.Identity() if start is None else start()
        self.blocks = nn.Sequential(*(make() for make in blocks))
        self.head = nn.Sequential(*(make() for make in head))
        if tied:
            self.head[-1].weight = self.start.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.blocks(self.start(x)))
        return h.transpose(1, 2) if h.ndim == 3 else h  # classes second, as the criteria want
