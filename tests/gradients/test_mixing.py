"""Where the batch is followed through a graph, no sample's loss depends on another sample's row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from irw_optim import IRWOptimizer
from irw_optim.gradients.graph import fingerprint, walk
from irw_optim.gradients.mixing import follow_batch

B, T, D = 3, 3, 4  # as long as the batch is large, so that sizes give nothing away

Operation = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def square(width: int = D) -> Tensor:
    return torch.linspace(-1, 1, width * width).view(width, width).cos().requires_grad_()


def attention(h: Tensor) -> Tensor:
    q = h.view(B, T, 2, D // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)


def written_in_place(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = h[:, 1] * 2
    return h


def batch_norm(h: Tensor, training: bool) -> Tensor:
    return F.batch_norm(h.mT, torch.zeros(D), torch.ones(D), training=training)


def recurrent(first: bool) -> Operation:
    def run(h: Tensor) -> Tensor:
        torch.manual_seed(0)
        layer = nn.LSTM(D, 2, batch_first=first).to(h.dtype)
        return layer(h if first else h.transpose(0, 1))[0].transpose(0, 0 if first else 1)

    return run


APART: dict[str, Operation] = {
    "elementwise": lambda h: h.tanh() * 2 + h.exp(),
    "copied": lambda h: (h * 2).copy_(h[:, :1] * square()[0]),
    "broadcast": lambda h: h * square()[0] + h[:, :1],
    "linear": lambda h: F.linear(h, square(), square()[0]),
    "matrix product": lambda h: h @ square(),
    "from the left": lambda h: square(T) @ h,
    "by a vector": lambda h: h.flatten(0, 1) @ square()[0],
    "samples in columns": lambda h: (square() @ h[:, 0].t()).t(),
    "between positions": lambda h: (h @ h.mT).softmax(-1) @ h,
    "attention": attention,
    "einsum": lambda h: torch.einsum("btd,bsd->bts", h, h),
    "time first and back": lambda h: h.transpose(0, 1).cumsum(0).transpose(0, 1),
    "batch last and back": lambda h: h.permute(1, 2, 0).softmax(0).permute(2, 0, 1),
    "folded": lambda h: F.relu(h.reshape(B * T, D) @ square()).view(B, T, D),
    "folded, time first": lambda h: (h.transpose(0, 1).reshape(T * B, D) @ square()).view(T, B, D)[
        0
    ],
    "convolution": lambda h: F.conv1d(h.mT, square()[:, :, None].expand(-1, -1, 2)),
    "pooling": lambda h: F.max_pool1d(h, 2) + F.avg_pool1d(h, 2),
    "windows": lambda h: F.unfold(h[:, None], (2, 3), padding=1).softmax(1),
    "windows and back": lambda h: F.fold(F.unfold(h[:, None], (2, 2)).softmax(1), (T, D), (2, 2)),
    "windows along a dimension": lambda h: h.unfold(1, 2, 1).sum(2) @ h.unfold(-1, 2, 1)[:, 0].mT,
    "resized": lambda h: (
        F.interpolate(h[:, None], (2, 5), mode="bicubic", antialias=True)
        + F.interpolate(h[:, None], (2, 5), mode="bilinear", antialias=True)
        + F.interpolate(h[:, None], (2, 5), mode="nearest-exact")
    ),
    "sampled at points of its own": lambda h: F.grid_sample(
        h[:, None], h.view(B, T, 2, 2).tanh(), align_corners=False
    ),
    "channels shuffled": lambda h: F.channel_shuffle(h.transpose(1, 2), 2),
    "layer norm": lambda h: F.layer_norm(h, (D,), square()[0]),
    "group norm": lambda h: F.group_norm(h.mT, 2),
    "instance norm": lambda h: F.instance_norm(h.mT),
    "batch norm with running statistics": lambda h: batch_norm(h, training=False),
    "reductions": lambda h: (
        h.mean(1) + h.sum(1) + h.amax(1) + h.std(1) + h.logsumexp(1) + h.max(1)[0]
    ),
    "reductions that keep": lambda h: h - h.mean(1, keepdim=True) - h.amax((1, 2), keepdim=True),
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "concatenation": lambda h: torch.cat([h, h.flip(1)], 1),
    "two views of each sample": lambda h: torch.cat([h, h.exp()]).tanh().chunk(2)[1],
    "the second view of each sample": lambda h: torch.cat([h, h.exp()]).tanh()[B:],
    "concatenation with nothing": lambda h: torch.cat([torch.cat([h[:, :0], h], 1), h[:0]]),
    "stacks": lambda h: torch.stack([h, h * 2], 1).unbind(2)[0],
    "a slice of the whole": lambda h: h.narrow(0, 0, B) + h.narrow(1, 0, T),
    "pieces": lambda h: h.chunk(2, -1)[0] * h.split([1, 3], -1)[0],
    "shifts": lambda h: h.roll(1, 1) + h.flip(-1) + h.cumsum(1) + h.sort(1)[0],
    "looked up": lambda h: h.gather(1, torch.tensor([0, 2]).view(1, 2, 1).expand(B, 2, D)),
    "its own position": lambda h: h[torch.arange(B), torch.tensor([2, 0, 1])],
    "some positions": lambda h: h[:, torch.tensor([2, 0])],
    "token in front": lambda h: torch.cat([square()[0].expand(B, 1, D), h], 1),
    "token in front, repeated": lambda h: torch.cat([square()[0].repeat(B, 1, 1), h], 1),
    "tiled": lambda h: h.repeat(1, 2, 1),
    "padded": lambda h: F.pad(h, (1, 0, 0, 2)),
    "masked": lambda h: h.masked_fill(torch.eye(T, dtype=torch.bool)[..., None], 0.0),
    "LSTM": recurrent(first=True),
    "LSTM, time first": recurrent(first=False),
    "Fourier": lambda h: torch.fft.rfft(h, dim=1).abs(),
}

MIXED: dict[str, Operation] = {
    "centred": lambda h: h - h.mean(0),
    "batch norm": lambda h: batch_norm(h, training=True),
    "softmax over the batch": lambda h: h.softmax(0),
    "cumulated over the batch": lambda h: h.cumsum(0),
    "rolled": lambda h: h.roll(1, 0),
    "rolled by parts": lambda h: torch.cat([h[1:], h[:1]]),
    "half of two views": lambda h: torch.cat([h, h.exp()])[1 : 1 + B],
    "a row and a half of two views": lambda h: (
        torch.cat([h, h.exp(), h])[6:8].sum(0).expand(B, T, D)
    ),
    "every other row of two views": lambda h: torch.cat([h, h.exp()])[::2],
    "parts of two views": lambda h: torch.cat([h, h.exp()]).split([1, B, B - 1])[1],
    "rolled through": lambda h: h.roll(1),
    "flipped": lambda h: h.flip(0),
    "sorted": lambda h: h.sort(0)[0],
    "the largest": lambda h: h + h.amax(0),
    "in reverse order": lambda h: h[torch.tensor([2, 1, 0])],
    "shared rows": lambda h: h.index_select(0, torch.tensor([0, 0, 2])),
    "gathered": lambda h: h.gather(0, torch.zeros(B, T, D, dtype=torch.long)),
    "scattered": lambda h: torch.zeros_like(h).index_add(0, torch.tensor([0, 1, 1]), h),
    "transposed": lambda h: h.transpose(0, 1),
    "windows over the batch": lambda h: F.fold(
        F.unfold(h.permute(2, 0, 1)[None], (2, 1)).softmax(1), (B, T), (2, 1)
    )[0].permute(1, 2, 0),
    "windows along the batch": lambda h: F.pad(h, (0, 0, 0, 0, 1, 1)).unfold(0, 3, 1).mean(-1),
    "another fold": lambda h: h.reshape(B * T, D).view(T, B, D).transpose(0, 1),
    "linear over the batch": lambda h: (h.permute(1, 2, 0) @ square(B)).permute(2, 0, 1),
    "between samples": lambda h: (h[:, 0] @ h[:, 0].t()).softmax(-1) @ h[:, 0],
    "pairs": lambda h: (h[:, None] - h[None]).square().sum(1),
    "attention over the batch": lambda h: attention(h.transpose(0, 1)).transpose(0, 1).flatten(2),
    "graph": lambda h: torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1.0]]) @ h[:, 0],
    "mixup": lambda h: 0.7 * h + 0.3 * h[torch.tensor([1, 0, 2])],
    "written in place": lambda h: h.clone().index_copy_(0, torch.tensor([0]), h[1:2]),
    "LSTM over the batch": lambda h: recurrent(first=False)(h.transpose(0, 1)).transpose(0, 1),
    "Fourier over the batch": lambda h: torch.fft.rfft(h, dim=0).abs()[torch.tensor([0, 1, 1])],
}


def losses_of(operation: Operation, h: Tensor) -> Tensor:
    output = operation(h)
    factors = torch.arange(1.0, output[0].numel() + 1, dtype=output.dtype).view(output[0].shape)
    return (output * factors).reshape(B, -1).sum(1)


def samples_meet(operation: Operation, h: Tensor) -> bool:
    losses = losses_of(operation, h)
    for i in range(B):
        (row,) = torch.autograd.grad(losses[i], h, retain_graph=True)
        if bool(row[torch.arange(B) != i].any()):
            return True
    return False


def input_rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, D, dtype=dtype, requires_grad=True) * 1  # no leaf


def batch_is_followed(losses: Tensor, h: Tensor) -> bool:
    """Whether the losses are proven to read the rows of h, each its own."""
    graph = walk(losses)
    batch, edge = follow_batch(losses, graph), get_gradient_edge(h)
    place = batch.places.get((graph.nodes[edge.node], edge.output_nr))
    return batch.mixed_by is None and place == (h[0].numel(), 0)


@pytest.mark.parametrize("name", APART)
def test_samples_that_stay_apart_are_proven_to(name):
    # Only in float32 is an LSTM one operation on the CPU.
    h = input_rows(torch.float32 if name.startswith("LSTM") else torch.float64)
    assert not samples_meet(APART[name], h)
    assert batch_is_followed(losses_of(APART[name], h), h)


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_meet_are_never_missed(name):
    h = input_rows(torch.float32 if name.startswith("LSTM") else torch.float64)
    assert samples_meet(MIXED[name], h)
    assert not batch_is_followed(losses_of(MIXED[name], h), h)


def test_slices_from_wherever_are_of_one_kind():
    h, table = input_rows(), torch.randn(9, D, requires_grad=True) * 1
    several = [losses_of(lambda h, s=s: h + table[s : s + T], h) for s in (1, 2, 4, 5)]
    _, *kinds = [fingerprint(losses, walk(losses)) for losses in several]  # the first learns names
    assert len(set(kinds)) == 1


def test_what_is_written_in_place_is_not_followed():
    h = input_rows()
    assert not batch_is_followed(losses_of(written_in_place, h), h)


class Switched(nn.Module):
    """Treats its samples apart until told otherwise."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.operation = operation
        self.mixes = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.operation(h) if self.mixes else h)


@pytest.mark.parametrize("name", ["mixup", "shared rows", "graph", "centred", "rolled"])
@pytest.mark.parametrize("begins", [1, 6])
def test_mixing_that_begins_between_two_checks_is_exact_at_once(name, begins):
    def operation(h: Tensor) -> Tensor:
        return MIXED[name](h[:, None].expand(-1, T, -1)).reshape(B, -1, D)[:, 0]

    model = Switched(operation)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model)
    for step in range(8):
        model.mixes = step >= begins
        x, y = torch.randn(B, D), torch.randint(2, (B,))
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, model.parameters(), 0.3)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        agree(optimizer, model, truth)
        optimizer.step()
