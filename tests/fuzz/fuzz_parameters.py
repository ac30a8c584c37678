"""Parameters used by keyword, as views, expanded, indexed, tied, and beside sizes that coincide.

Every use is a function of the parameters w (d, d), v (d,), s () and the table (R, d), and of x
with features last: (B, d) or (B, T, d). What it returns has x's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_nets import CLASSES, alone
from fuzz_trials import Draw, Trial
from torch import Tensor, nn

ROWS = 4
"""Of the table."""

Use = Callable[[Any, Tensor], Tensor]


def stacked(p: Any, x: Tensor) -> Tensor:
    """Sample by sample."""
    return torch.stack([row @ p.w for row in x])


def token(p: Any, x: Tensor) -> Tensor:
    """A class token in front, seen by all."""
    h = x if x.ndim == 3 else x[:, None]
    h = torch.cat([p.v.expand(len(x), 1, -1), h], 1)
    return x + h.tanh().mean(1).view(len(x), *[1] * (x.ndim - 2), -1)


def start(p: Any, x: Tensor) -> Tensor:
    """A state to begin with, repeated for each sample and changed in place."""
    h = p.v.repeat(len(x), 1)
    h.mul_(0.5)
    return x + h.view(len(x), *[1] * (x.ndim - 2), -1)


def positions(how: str, p: Any, x: Tensor) -> Tensor:
    """Rows of the table by position in the sequence; by feature for vectors."""
    T = x.shape[1] if x.ndim == 3 else 1
    where = torch.arange(T) % ROWS
    rows = {
        "slice": lambda: p.table[:T] if T <= ROWS else p.table[where],
        "index": lambda: p.table[where],
        "index_select": lambda: torch.index_select(p.table, dim=0, index=where),
        "embedding": lambda: F.embedding(input=where, weight=p.table),
        "embedding of a batch": lambda: F.embedding(where.expand(len(x), T), p.table),
        "expanded": lambda: p.table[where][None].expand(len(x), -1, -1),
        "gather": lambda: p.table.gather(0, where[:, None].expand(-1, p.table.shape[1])),
    }[how]()
    h = x if x.ndim == 3 else x[:, None]
    return (h + rows).tanh().view_as(x)


def looked_up(p: Any, x: Tensor) -> Tensor:
    """A row of the table for each sample."""
    which = (x.reshape(len(x), -1)[:, 0] > 0).long() + 1
    return x * p.table[which].view(len(x), *[1] * (x.ndim - 2), -1)


def one_hot(p: Any, x: Tensor) -> Tensor:
    which = (x.reshape(len(x), -1)[:, 0] > 0).long()
    rows = F.one_hot(which, ROWS).to(x.dtype) @ p.table
    return x + rows.view(len(x), *[1] * (x.ndim - 2), -1)


def products_with_expanded(p: Any, x: Tensor) -> Tensor:
    h = x if x.ndim == 3 else x[:, None]
    return torch.bmm(h, p.w.expand(len(x), -1, -1)).view_as(x)


def in_place(p: Any, x: Tensor) -> Tensor:
    h = x * 1
    h[..., 0] = p.s
    h += p.v
    return h.mul_(p.v)


def halves(p: Any, x: Tensor) -> Tensor:
    upper, lower = p.w.chunk(2)
    left, right = x.chunk(2, -1)
    return left @ upper + right @ lower


def gates(p: Any, x: Tensor) -> Tensor:
    """One matrix for two layers, as fused projections have."""
    first, second = torch.cat([p.w, p.w.T]).split(p.w.shape[0])
    return F.linear(x, first).sigmoid() * F.linear(x, second)


def bilinear(p: Any, x: Tensor) -> Tensor:
    return x + F.bilinear(x, x.flip(-1).contiguous(), weight=p.w[None])


def rows_by_rows(p: Any, x: Tensor) -> Tensor:
    """Parameters on the side of the batch: x^T has it last."""
    return (p.v[:, None] * x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)


USES: dict[str, Use] = {
    "add, alpha": lambda p, x: torch.add(x, p.v, alpha=0.5),
    "add, by keyword": lambda p, x: torch.add(input=x, other=p.v),
    "add to, alpha": lambda p, x: torch.add(p.v, x, alpha=2.0),
    "x.add": lambda p, x: x.add(p.v, alpha=0.3).add(other=p.s),
    "sub, alpha": lambda p, x: torch.sub(x, p.v, alpha=2),
    "rsub": lambda p, x: torch.rsub(x, p.v, alpha=0.5) + (1.0 - p.s),
    "mul, by keyword": lambda p, x: torch.mul(input=x, other=p.v),
    "x.mul": lambda p, x: x.mul(other=p.v),
    "div": lambda p, x: torch.div(x, 2 + p.v.square(), rounding_mode=None),
    "scalar": lambda p, x: x * p.s.exp() - p.s,
    "scalar as a vector": lambda p, x: x * p.s.expand(x.shape[-1]),
    "power": lambda p, x: x.abs().add(0.1) ** p.s.sigmoid(),
    "linear": lambda p, x: F.linear(x, p.w, p.v),
    "linear, by keyword": lambda p, x: F.linear(input=x, weight=p.w, bias=p.v),
    "linear, weight=": lambda p, x: F.linear(x, weight=p.w, bias=None),
    "addmm": lambda p, x: torch.addmm(
        p.v, x.reshape(-1, x.shape[-1]), p.w, beta=0.5, alpha=2
    ).view_as(x),
    "matmul": lambda p, x: torch.matmul(x, p.w),
    "matmul, other=": lambda p, x: torch.matmul(input=x, other=p.w),
    "x.matmul": lambda p, x: x.matmul(p.w.t()),
    "mm": lambda p, x: torch.mm(input=x.reshape(-1, x.shape[-1]), mat2=p.w).view_as(x),
    "w @ x": lambda p, x: (p.w @ x.unsqueeze(-1)).squeeze(-1),
    "w @ x^T": lambda p, x: (p.w @ x.transpose(-1, -2)).transpose(-1, -2),
    "mv": lambda p, x: x + torch.matmul(x, p.v)[..., None],
    "einsum": lambda p, x: torch.einsum("...i,oi->...o", x, p.w),
    "einsum, turned": lambda p, x: torch.einsum("io,...i->...o", p.w, x),
    "einsum, of three": lambda p, x: torch.einsum("...i,io,o->...o", x, p.w, p.v),
    "tensordot": lambda p, x: torch.tensordot(x, p.w, dims=1),
    "tensordot, lists": lambda p, x: torch.tensordot(x, p.w, dims=([-1], [1])),
    "bmm of an expanded": products_with_expanded,
    "baddbmm": lambda p, x: torch.baddbmm(
        p.v.expand(len(x), 1, -1), x.reshape(len(x), -1, x.shape[-1]), p.w.expand(len(x), -1, -1)
    ).view_as(x),
    "sample by sample": stacked,
    "expand_as": lambda p, x: x + p.v.expand_as(x),
    "expand": lambda p, x: x * p.v.expand(*x.shape[:-1], -1),
    "expand, size=": lambda p, x: x + p.v.expand(size=x.shape),
    "broadcast_to": lambda p, x: x + torch.broadcast_to(p.v, x.shape),
    "expanded over features": lambda p, x: (
        x + p.s.reshape(1, 1).expand(len(x), x.shape[-1]).view(len(x), *[1] * (x.ndim - 2), -1)
    ),
    "repeat": lambda p, x: x + p.v.repeat(*x.shape[:-1], 1),
    "repeat_interleave": lambda p, x: (
        x + p.v[None].repeat_interleave(len(x), 0).view(len(x), *[1] * (x.ndim - 2), -1)
    ),
    "None": lambda p, x: x * p.v[None],
    "unsqueeze": lambda p, x: x + p.v.unsqueeze(0),
    "view": lambda p, x: x - p.v.view(*[1] * (x.ndim - 1), -1),
    "ones @": lambda p, x: x + x.new_ones(*x.shape[:-1], 1) @ p.v[None],
    "lerp": lambda p, x: torch.lerp(x, p.v.expand_as(x), 0.3),
    "addcmul": lambda p, x: torch.addcmul(x, p.v, x, value=2.0),
    "where": lambda p, x: torch.where(x > 0, x, x * p.v),
    "maximum": lambda p, x: torch.maximum(x, p.v),
    "clamp": lambda p, x: torch.clamp(x, min=p.v - 1, max=p.v + 1),
    "prelu": lambda p, x: F.prelu(x, weight=p.s[None]),
    "slices": lambda p, x: x[..., :2] @ p.w[:2] + x[..., 2:] @ p.w[2:],
    "columns": lambda p, x: torch.cat([x @ p.w[:, :1], x @ p.w[:, 1:]], -1),
    "chunks": halves,
    "split": gates,
    "unbind": lambda p, x: x * torch.stack(p.w.unbind(0)[::-1]).mean(0),
    "transposed": lambda p, x: x @ p.w.T.contiguous() @ p.w.t(),
    "permuted": lambda p, x: x @ p.w[torch.randperm(p.w.shape[0])],
    "masked": lambda p, x: F.linear(x, p.w * torch.ones_like(p.w).tril()),
    "normalised": lambda p, x: F.linear(x, p.v[:, None] * p.w / p.w.norm(dim=1, keepdim=True)),
    "standardised": lambda p, x: F.linear(x, p.w - p.w.mean(1, keepdim=True)),
    "symmetric": lambda p, x: F.linear(x, p.w + p.w.T),
    "low rank": lambda p, x: F.linear(x, p.w[:, :1] @ p.w[:1]),
    "merged": lambda p, x: F.linear(x, p.w + torch.outer(p.v, p.v)),
    "in half": lambda p, x: F.linear(x, p.w.float().to(x.dtype)),
    "softplus": lambda p, x: x * F.softplus(p.v) + p.s.sigmoid(),
    "diagonal": lambda p, x: x @ torch.diag(p.v) + p.w.diagonal(),
    "tied": lambda p, x: F.linear(F.linear(x, p.w, p.v).tanh(), p.w.T, p.v),
    "called and used": lambda p, x: F.linear(p.layer(x).tanh(), p.layer.weight),
    "layer, by keyword": lambda p, x: p.layer(input=x),
    "layer, twice": lambda p, x: p.layer(p.layer(x).tanh()),
    "layer norm": lambda p, x: F.layer_norm(x, p.v.shape, weight=p.v, bias=p.v),
    "layer norm, by keyword": lambda p, x: F.layer_norm(
        input=x, normalized_shape=p.v.shape, weight=p.v
    ),
    "rms norm": lambda p, x: F.rms_norm(x, p.v.shape, weight=p.v),
    "group norm": lambda p, x: F.group_norm(
        x.reshape(-1, x.shape[-1]), x.shape[-1] // 2, weight=p.v, bias=p.v
    ).view_as(x),
    "batch norm, in evaluation": lambda p, x: F.batch_norm(
        x.reshape(-1, x.shape[-1]), p.v.detach(), p.v.detach().square() + 1, weight=p.v, bias=None
    ).view_as(x),
    "convolution": lambda p, x: F.conv1d(
        input=x.reshape(-1, x.shape[-1], 1), weight=p.w[:, :, None], bias=p.v
    ).view_as(x),
    "bilinear": bilinear,
    "token": token,
    "state": start,
    "in place": in_place,
    "looked up": looked_up,
    "one-hot": one_hot,
    "from the side": rows_by_rows,
    **{
        f"positions, {how}": partial(positions, how)
        for how in (
            "slice",
            "index",
            "index_select",
            "embedding",
            "embedding of a batch",
            "expanded",
            "gather",
        )
    },
}


class Using(nn.Module):
    """Some uses, one after the other, of one set of parameters."""

    def __init__(self, uses: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.uses = uses
        self.w = nn.Parameter(torch.randn(width, width) * 0.7)
        self.v = nn.Parameter(torch.randn(width))
        self.s = nn.Parameter(torch.randn(()))
        self.table = nn.Parameter(torch.randn(ROWS, width))
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        for use in self.uses:
            x = USES[use](self, x)
        return self.head(x.mean(1) if x.ndim == 3 else x)


def using(draw: Draw, name: str) -> Trial:
    """One use among others."""
    width = draw.pick(4, 4, 2)
    width = 4 if name in ("slices", "columns") else width
    uses = [name] + [draw.pick(*USES)] * draw.pick(0, 0, 1)
    draw.shuffle(uses)
    uses = [use for use in uses if width == 4 or use not in ("slices", "columns")]
    sizes = [draw.pick(1, 2, 3, 4, 4, 5, 8) for _ in range(4)]
    lengths = [draw.pick(1, 2, 3, 4, 4, 5, 8) for _ in range(4)] if draw.flag() else None
    engine = draw.pick("auto", "auto", "auto", "autodiff")
    rule = draw.rule()

    def batch(number: int) -> tuple[Tensor, Tensor]:
        B = sizes[number]
        inner = () if lengths is None else (lengths[number],)
        return torch.randn(B, *inner, width, dtype=torch.float64), torch.randint(CLASSES, (B,))

    def run(user: Any, batch: tuple[Tensor, Tensor]) -> None:
        user.backward(user.criterion(user.net(batch[0]), batch[1]))

    return Trial(
        story=f"{uses}, width {width}, sizes {sizes}, lengths {lengths}, {engine}, {rule}",
        world=partial(alone, partial(Using, tuple(uses), width)),
        batch=batch,
        loop=run,
        options={**rule, "engine": engine},
        seed=draw.seed_of_tensors,
        steps=draw.pick(1, 2, 3, 4),
    )
