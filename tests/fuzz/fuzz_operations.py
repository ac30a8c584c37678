"""Operations by which samples see each other: functions of h (B, d) and of a choice of a few.

Most of them leave most samples alone: no fixed probe of a few rows can find them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Few:
    """A few samples of a batch, and others in their place.

    Args:
        size: B.
        changed: how many are changed.
    """

    def __init__(self, size: int, changed: int) -> None:
        self.size = size
        order = torch.randperm(size)
        self.who = order[: min(changed, size)]
        self.whom = order.roll(1)[: len(self.who)]
        self.index = torch.arange(size)
        self.index[self.who] = self.whom
        self.order = order

    def adjacency(self, h: Tensor) -> Tensor:
        """The identity, but for a few neighbours."""
        matrix = torch.eye(self.size, dtype=h.dtype)
        matrix[self.who, self.whom] = 0.5
        return matrix

    def mean(self, h: Tensor) -> Tensor:
        return h[self.who].sum(0) / max(1, len(self.who))

    @property
    def mask(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.bool).index_fill(0, self.who, True)[:, None]


def unique_rows(h: Tensor, few: Few) -> Tensor:
    """Nodes that several samples share are computed once."""
    nodes, inverse = few.index.unique(return_inverse=True)
    return h[nodes][inverse]


def deduplicated(h: Tensor, few: Few) -> Tensor:
    first = torch.zeros(few.size, dtype=torch.long).scatter(0, few.index, torch.arange(few.size))
    return h.index_select(0, first[few.index])


def assigned(h: Tensor, few: Few) -> Tensor:
    out = h.clone()
    out[few.who] = h[few.whom].tanh()
    return out


def mixup(h: Tensor, few: Few) -> Tensor:
    return torch.where(few.mask, 0.7 * h + 0.3 * h[few.index], h)


def added(h: Tensor, few: Few) -> Tensor:
    return h.index_add(0, few.who, h[few.whom], alpha=0.5)


def scattered(h: Tensor, few: Few) -> Tensor:
    index = few.index[:, None].expand_as(h)
    return torch.zeros_like(h).scatter_add(0, index, h)


def graph(h: Tensor, few: Few) -> Tensor:
    return few.adjacency(h) @ h


def sparse_graph(h: Tensor, few: Few) -> Tensor:
    return torch.sparse.mm(few.adjacency(h).to_sparse_coo(), h)


def einsum_graph(h: Tensor, few: Few) -> Tensor:
    return torch.einsum("ij,jd->id", few.adjacency(h), h)


def message(h: Tensor, few: Few) -> Tensor:
    """One round on an edge list."""
    sent = h.new_zeros(h.shape).index_add_(0, few.who, h[few.whom] * 0.5)
    return h + sent


def masked(h: Tensor, few: Few) -> Tensor:
    return h.masked_scatter(few.mask.expand_as(h), h[few.whom].sin())


def picked(h: Tensor, few: Few) -> Tensor:
    return torch.gather(h, 0, few.index[:, None].expand_as(h))


def taken(h: Tensor, few: Few) -> Tensor:
    return torch.take_along_dim(h, few.index[:, None], 0)


def pairs(h: Tensor, few: Few) -> Tensor:
    """Neighbours share their mean."""
    even = few.size // 2 * 2
    mean = h[:even].unflatten(0, (-1, 2)).mean(1, keepdim=True).expand(-1, 2, -1)
    return torch.cat([mean.flatten(0, 1), h[even:]])


def first_token(h: Tensor, few: Few) -> Tensor:
    return torch.cat([h[:1], h[1:] + 0.3 * h[:1]])


def batched_norm(h: Tensor, few: Few) -> Tensor:
    if few.size < 2:
        return h
    return F.batch_norm(h, None, None, training=True)


def by_the_batch(h: Tensor, few: Few) -> Tensor:
    return torch.where(h > h.mean(0), h, 0.3 * h + 0.1 * h.amax(0))


def attention(h: Tensor, few: Few) -> Tensor:
    return (h @ h.T).softmax(1) @ h


def hidden_attention(h: Tensor, few: Few) -> Tensor:
    """Only the few look around."""
    seen = torch.full((few.size, few.size), -torch.inf, dtype=h.dtype)
    seen = seen.masked_fill(torch.eye(few.size, dtype=torch.bool), 0.0)
    seen[few.who, few.whom] = 0.0
    return (h @ h.T + seen).softmax(1) @ h


def along_the_batch(h: Tensor, few: Few) -> Tensor:
    kernel = torch.tensor([[[0.0, 1.0, 0.4]]], dtype=h.dtype)
    return F.conv1d(h.T[:, None], kernel, padding=1)[:, 0].T


def distances(h: Tensor, few: Few) -> Tensor:
    apart = (h[:, None] - h[None]).square().sum(-1)
    return h + (-apart).exp().sum(1, keepdim=True)


def shifted(h: Tensor, few: Few) -> Tensor:
    """Every sample's last feature is its neighbour's."""
    return h.flatten().roll(1).view_as(h)


def there_and_back(h: Tensor, few: Few) -> Tensor:
    """No mixing: sorted by something, and put back."""
    return h[few.order].tanh()[few.order.argsort()]


Mixing = Callable[[Tensor, Few], Tensor]

MIXINGS: dict[str, Mixing] = {
    "unique rows": unique_rows,
    "deduplicated": deduplicated,
    "indexed": lambda h, few: h[few.index],
    "index_select": lambda h, few: h.index_select(0, few.index),
    "gather": picked,
    "take_along_dim": taken,
    "assigned": assigned,
    "index_copy": lambda h, few: h.index_copy(0, few.who, h[few.whom]),
    "masked_scatter": masked,
    "mixup of some": mixup,
    "index_add": added,
    "scatter_add": scattered,
    "graph": graph,
    "sparse graph": sparse_graph,
    "einsum graph": einsum_graph,
    "messages": message,
    "pairs": pairs,
    "the first seen by all": first_token,
    "roll": lambda h, few: h.roll(1, 0),
    "shifted": shifted,
    "flip": lambda h, few: h.flip(0),
    "sort": lambda h, few: h.sort(0).values,
    "topk": lambda h, few: h.topk(few.size, 0).values,
    "cumsum": lambda h, few: h.cumsum(0),
    "cumprod": lambda h, few: h.sigmoid().cumprod(0),
    "cummax": lambda h, few: h.cummax(0).values,
    "logcumsumexp": lambda h, few: h.logcumsumexp(0),
    "centred": lambda h, few: h - h.mean(0),
    "standardised": lambda h, few: h / (1 + h.var(0, unbiased=False)),
    "batch norm": batched_norm,
    "softmax": lambda h, few: h.softmax(0),
    "normalised": lambda h, few: F.normalize(h, dim=0),
    "largest": lambda h, few: h + h.max(0).values,
    "norm of all": lambda h, few: h / (1 + h.norm()),
    "layer norm of all": lambda h, few: F.layer_norm(h, h.shape),
    "median": lambda h, few: h - h.median(0).values,
    "logsumexp": lambda h, few: h - h.logsumexp(0),
    "by the batch": by_the_batch,
    "attention": attention,
    "attention of few": hidden_attention,
    "along the batch": along_the_batch,
    "distances": distances,
    "cdist": lambda h, few: h + torch.cdist(h, h.detach() + 1).mean(1, keepdim=True),
    "the mean of few": lambda h, few: torch.where(few.mask, few.mean(h), h),
    "dropped for others": lambda h, few: h * (~few.mask) + h.roll(1, 0) * few.mask,
    "transposed": lambda h, few: (h.T @ few.adjacency(h)).T,
    # No sample sees another in these, though nobody can tell by the names.
    "there and back": there_and_back,
    "indexed by itself": lambda h, few: h[torch.arange(few.size)],
    "of few": lambda h, few: h.index_copy(0, few.who, h[few.who].sin()),
    "branches": lambda h, few: torch.where(few.mask, h.sin(), h.tanh()),
}
