"""A batch as long as its sequences, a table with as many rows: what goes the quick way stays."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import reference
import torch
from agreement import agree
from torch import Tensor, nn

from irw_optim import IRWOptimizer

ALPHA, STEPS = 0.3, 2

PLAIN = (17, 5, 6, 11)
"""B, T, the width and the rows of the tables, where no two are alike."""

COINCIDING = [
    (16, 16, 6, 11),
    (6, 5, 4, 6),
    (6, 12, 4, 6),
    (5, 5, 5, 5),
    (4, 8, 4, 8),
    (2, 2, 4, 4),
    (16, 1, 16, 16),
]


class Model(nn.Module):
    """Reads (B, T) of tokens; `read` says how."""

    def __init__(self, read: Callable[[Model, Tensor], Tensor], length: int, width: int, rows: int):
        super().__init__()
        self.read = read
        longest = max(rows, length)
        self.token, self.kind = nn.Embedding(rows, width), nn.Embedding(4, width)
        self.position = nn.Embedding(longest, width)
        self.table = nn.Parameter(torch.randn(longest, width))
        self.first = nn.Parameter(torch.randn(1, 1, width))
        self.gain = nn.Parameter(torch.randn(width))
        self.gate = nn.Parameter(torch.zeros(width))
        self.scalar = nn.Parameter(torch.randn(()))
        self.middle, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.attention_time_first = nn.MultiheadAttention(width, 1)
        self.channels = nn.Conv1d(width, 4, 1)
        self.statistics = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)

    def body(self, h: Tensor) -> Tensor:
        return self.last(self.norm(self.middle(h)) * self.gain)


def at(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def positions_of_a_chain(model, x):
    known = model.position(at(x)) + model.kind(at(x) % 4)
    return model.last(model.token(x) + known.unsqueeze(0).expand(len(x), -1, -1))


def class_token(model, x):
    h = torch.cat([model.first.expand(len(x), -1, -1), model.token(x)], 1)
    return model.last(h)


def attended(model, x):
    h = model.token(x)
    return model.last(model.attention(h, h, h)[0])


def attended_time_first(model, x):
    h = model.token(x.t())
    return model.last(model.attention_time_first(h, h, h)[0].transpose(0, 1))


def a_step_of_each(model, x):  # another position for every sample
    h, samples = model.middle(model.token(x.t())), torch.arange(len(x))
    return model.last(h[samples % x.shape[1], samples])


def behind_a_gate_of_zeros(model, x):  # no gradient arrives at `middle` in the first step
    h = model.token(x.t())
    return model.last(h + model.middle(h) * model.gate).transpose(0, 1)


def batch_third(model, x):
    h = model.token(x)[:, :, None].expand(-1, -1, 3, -1).permute(1, 2, 0, 3)
    return model.last(model.middle(h) * model.gain).permute(2, 0, 1, 3).mean(1)


def behind_batch_statistics(model, x):  # samples meet, and part again
    h = model.statistics(model.token(x).transpose(1, 2)).transpose(1, 2)
    h = h + model.position(at(x))
    return model.body(h.transpose(0, 1)).transpose(0, 1)


READINGS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "batch first": lambda m, x: m.body(m.token(x)),
    "time first": lambda m, x: m.body(m.token(x.t())).transpose(0, 1),
    "folded": lambda m, x: m.body(m.token(x).flatten(0, 1)).unflatten(0, x.shape),
    "folded, time first": lambda m, x: (
        m.body(m.token(x.t()).flatten(0, 1)).unflatten(0, x.t().shape).transpose(0, 1)
    ),
    "folded tokens": lambda m, x: m.body(m.token(x.flatten())).unflatten(0, x.shape),
    "batch third": batch_third,
    "last step, time first": lambda m, x: m.last(m.middle(m.token(x.t()))[-1]),
    "a step of each": a_step_of_each,
    "behind a gate of zeros": behind_a_gate_of_zeros,
    "scalar, time first": lambda m, x: m.last(m.token(x.t()) * m.scalar).transpose(0, 1),
    "positions (T,)": lambda m, x: m.body(m.token(x) + m.position(at(x))),
    "positions (1, T)": lambda m, x: m.body(m.token(x) + m.position(at(x)[None])),
    "positions (T, 1), time first": lambda m, x: m.last(
        m.token(x.t()) + m.position(at(x)[:, None])
    ).transpose(0, 1),
    "positions unsqueezed, time first": lambda m, x: m.last(
        m.token(x.t()) + m.position(at(x)).unsqueeze(1)
    ).transpose(0, 1),
    "positions of a chain": positions_of_a_chain,
    "one kind for each sample": lambda m, x: m.last(m.token(x) + m.kind(x[:, 0] % 4)[:, None]),
    "one kind for each sample, time first": lambda m, x: m.last(
        m.token(x.t()) + m.kind(x[:, 0] % 4)
    ).transpose(0, 1),
    "one kind for each sample, no positions": lambda m, x: m.last(
        m.token(x).mean(1) + m.kind(x[:, 0] % 4)
    ),
    "rows of a table": lambda m, x: m.last(m.token(x) + m.table[: x.shape[1]]),
    "rows of a table, time first": lambda m, x: m.last(
        m.token(x.t()) + m.table[: x.shape[1], None]
    ).transpose(0, 1),
    "lookups in a table": lambda m, x: m.last(m.table[x]),
    "lookups in a table, by position": lambda m, x: m.last(m.token(x) + m.table[at(x)]),
    "a layer reads the table": lambda m, x: m.last(m.token(x) + m.middle(m.table[: x.shape[1]])),
    "a layer reads all tokens": lambda m, x: m.last(m.token(x)) @ m.last(m.token.weight).T,
    "behind batch statistics": behind_batch_statistics,
    "class token": class_token,
    "attention": attended,
    "attention, time first": attended_time_first,
    "channels": lambda m, x: m.channels(m.token(x).transpose(1, 2)),
}


def train(reading: str, sizes: tuple[int, int, int, int]) -> tuple[set[str], set[str]]:
    """Some steps beside the loop: the names of the parameters covered, and of those used."""
    batch, length, width, rows = sizes
    torch.manual_seed(0)
    model = Model(READINGS[reading], length, width, rows).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for _ in range(STEPS):
        x = torch.randint(rows, (batch, length))
        truth = reference.step(losses_of(model, x), model.parameters(), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, truth)
        optimizer.step()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    covered = optimizer.engine.covered_parameters()
    return {name for name, p in model.named_parameters() if p in covered} & used, used


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    pattern = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return ((output + pattern) * pattern).square().flatten(1).mean(1)


MIXING = {
    "behind batch statistics",
    "lookups in a table",
}
"""Where samples meet, or may: all of it goes through the graph, forwards."""


@pytest.mark.parametrize("sizes", [PLAIN, *COINCIDING], ids=str)
@pytest.mark.parametrize("reading", READINGS)
def test_the_same_parameters_are_covered_whatever_the_sizes(reading, sizes):
    covered, used = train(reading, sizes)
    assert covered == (set() if reading in MIXING else used)


@pytest.mark.parametrize("sizes", [(1, 5, 6, 11), (1, 1, 4, 4), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("reading", READINGS)
def test_a_batch_of_one_sample(reading, sizes):
    if reading == "behind batch statistics" and sizes[1] == 1:
        pytest.skip("torch makes no statistics of one number")
    train(reading, sizes)


@pytest.mark.parametrize("reading", ["time first", "positions (T,)", "folded, time first"])
def test_sizes_that_come_to_coincide_in_mid_training(reading):
    torch.manual_seed(0)
    model = Model(READINGS[reading], 16, 6, 11).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for batch, length in ((6, 5), (6, 6), (6, 12), (12, 6), (5, 6), (6, 6), (1, 6), (3, 3)):
        x = torch.randint(11, (batch, length))
        truth = reference.step(losses_of(model, x), model.parameters(), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, truth)
        assert optimizer.engine.covered_parameters() >= {model.token.weight, model.last.weight}
        optimizer.step()


def test_a_tie_is_settled_without_a_word(caplog):
    model = Model(READINGS["time first"], 6, 4, 11).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.05), alpha=ALPHA, model=model)
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, torch.randint(11, (6, 6))))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
