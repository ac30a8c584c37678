"""Operations by which samples see each other, of which neither name nor graph says so.

In functions of users, in place, through views of the memory, along a dimension that was the batch;
and layers, with parameters of their own, that read the batch as something else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from fuzz_operations import Few, Mixing
from torch import Tensor, nn


class Centre(torch.autograd.Function):
    """Subtracts half the mean of the batch; the graph shows a name, and nothing else."""

    @staticmethod
    def forward(ctx, h):
        return h - 0.5 * h.mean(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - 0.5 * gradient.mean(0)


class Shared(torch.autograd.Function):
    """The identity, whose gradient is partly that of all (as a normaliser of gradients has it)."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.7 * gradient + 0.3 * gradient.mean(0)


class Borrowed(torch.autograd.Function):
    """A few samples' rows are others'."""

    @staticmethod
    def forward(ctx, h, index):
        ctx.index = index
        return h[index]

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(gradient).index_add(0, ctx.index, gradient), None


class Sub(torch.autograd.Function):
    """By a name that an operation of torch has."""

    @staticmethod
    def forward(ctx, h, index):
        ctx.index = index
        return h[index] - 0.5 * h.mean(0) * (index != torch.arange(len(h))).any()

    @staticmethod
    def backward(ctx, gradient):
        into = torch.zeros_like(gradient).index_add(0, ctx.index, gradient)
        changed = (ctx.index != torch.arange(len(gradient))).any()
        return into - 0.5 * gradient.mean(0) * changed, None


class Alone(torch.autograd.Function):
    """A function of each sample alone, which nobody can know."""

    @staticmethod
    def forward(ctx, h):
        return 2.0 * h

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient


def subtracted(h: Tensor, few: Few) -> Tensor:
    h = h * 1
    return h.sub_(h.detach().mean(0)).add_(0.2 * h.sum(0))


def neighbours(h: Tensor, few: Few) -> Tensor:
    out = h.clone()
    out[1:] += 0.4 * h[:-1]
    return out


def written(h: Tensor, few: Few) -> Tensor:
    out = torch.zeros_like(h)
    for i, j in enumerate(few.index.tolist()):
        out[i] = h[j]
    return out


def strided(h: Tensor, few: Few) -> Tensor:
    """Every row and half of the next, by strides."""
    size, width = h.shape
    padded = torch.cat([h.reshape(-1), h.new_zeros(width)])
    windows = padded.as_strided((size, width + width // 2), (width, 1))
    return windows[:, :width] + 0.3 * windows[:, -width:]


def unfolded(h: Tensor, few: Few) -> Tensor:
    return F.pad(h, (0, 0, 1, 1)).unfold(0, 3, 1).mean(-1)


def turned(h: Tensor, few: Few) -> Tensor:
    """The numbers of the batch, read column by column."""
    return h.T.reshape(h.shape)


def in_two(h: Tensor, few: Few) -> Tensor:
    """Two samples as one with twice the features, and back."""
    even = few.size // 2 * 2
    both = h[:even].reshape(even // 2, 2 * h.shape[1])
    return torch.cat([both.roll(1, 1).view(even, h.shape[1]), h[even:]])


def rotated(h: Tensor, few: Few) -> Tensor:
    return torch.fft.ifft(torch.fft.fft(h, dim=0) * 0.9, dim=0).real + 0.1 * h.flip(0)


def whitened(h: Tensor, few: Few) -> Tensor:
    covariance = h.T @ h / few.size + torch.eye(h.shape[1], dtype=h.dtype)
    return torch.linalg.solve(covariance, h.T).T


def fused(h: Tensor, few: Few) -> Tensor:
    q = h[None, None]
    return F.scaled_dot_product_attention(q, q, q)[0, 0]


def pooled(h: Tensor, few: Few) -> Tensor:
    return F.max_pool1d(h.T[None], 3, stride=1, padding=1)[0].T


def summed(h: Tensor, few: Few) -> Tensor:
    rows = h[:, None]
    return h + 0.1 * torch.addbmm(h.new_zeros(1, h.shape[1]), rows[:, :, :1] * 0 + 1, rows)


def by_columns(h: Tensor, few: Few) -> Tensor:
    return torch.vmap(lambda column: column - 0.5 * column.mean(), in_dims=1, out_dims=1)(h)


HIDDEN: dict[str, Mixing] = {
    "a user's function": lambda h, few: Centre.apply(h),
    "a user's gradient": lambda h, few: Shared.apply(h),
    "a user's gather": lambda h, few: Borrowed.apply(h, few.index),
    "a user's function by a common name": lambda h, few: Sub.apply(h, few.index),
    "vmap over features": by_columns,
    "in place": subtracted,
    "neighbours, in place": neighbours,
    "written row by row": written,
    "row by row": lambda h, few: torch.stack([h[i] for i in few.index.tolist()]),
    "strided": strided,
    "unfolded": unfolded,
    "turned": turned,
    "in two": in_two,
    "diff": lambda h, few: torch.cat([h[:1], h.diff(dim=0)]),
    "renormalised": lambda h, few: torch.renorm(h, 2, 1, 1.0),
    "fourier": rotated,
    "whitened": whitened,
    "fused attention": fused,
    "pooled": pooled,
    "addbmm": summed,
    "layer norm along": lambda h, few: F.layer_norm(h.T, (few.size,)).T + h,
    "by the norm of the largest": lambda h, few: h / (1 + h.norm(dim=1).max()),
    "checkpointed": lambda h, few: torch.utils.checkpoint.checkpoint(
        lambda h: h - 0.5 * h.mean(0), h, use_reentrant=False
    ),
    # No sample sees another in these.
    "a user's function of each": lambda h, few: Alone.apply(h),
    "vmap": lambda h, few: torch.vmap(lambda row: row.softmax(0))(h),
    "in pieces": lambda h, few: torch.cat([piece.tanh() for piece in h.split(2)]),
}


class Wide(nn.Module):
    """A layer on two samples at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * width, 2 * width)

    def forward(self, h):
        even = len(h) // 2 * 2
        both = self.layer(h[:even].reshape(even // 2, 2 * h.shape[1])).view(even, h.shape[1])
        return torch.cat([both, h[even:]])


class AsSequence(nn.Module):
    """A layer that reads the batch as one sequence."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "recurrent":
            self.layer: nn.Module = nn.GRU(width, width)
        elif kind == "attention":
            self.layer = nn.MultiheadAttention(width, 2)
        elif kind == "transformer":
            self.layer = nn.TransformerEncoderLayer(width, 2, 5, dropout=0.0)
        else:
            self.layer = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, h):
        if self.kind == "attention":
            return self.layer(h, h, h)[0]
        if self.kind == "convolution":
            return self.layer(h.T).T
        out = self.layer(h)
        return out[0] if self.kind == "recurrent" else out


class Channels(nn.Module):
    """BatchNorm with the samples as channels' places: the batch is the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(width)

    def forward(self, h):
        return self.layer(h.T[None])[0].T if len(h) > 1 else h


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "a layer of pairs": Wide,
    **{
        f"{kind} over the batch": lambda width, kind=kind: AsSequence(kind, width)
        for kind in ("recurrent", "attention", "transformer", "convolution")
    },
    "batch norm of one": Channels,
}
