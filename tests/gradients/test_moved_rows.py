"""Rows that an index moves: nodes and edges of graphs of all sizes, bags, tokens of experts.

Whose a row is changes from step to step; products are quick where the samples stay apart, and the
step is the loop's wherever they meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import products
import pytest
import reference
import torch
from agreement import agree
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.gradients.graph import walk
from irw_optim.gradients.mixing import follow_batch

pytestmark = pytest.mark.cpu("on a device an index is not looked at: what it moves goes forwards")

B, D, ALPHA = 5, 4, 0.4


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Graphs(NamedTuple):
    """Samples with nodes and, between these, edges."""

    x: Tensor  # (nodes, D)
    edges: Tensor  # (2, edges)
    sample: Tensor  # of each node

    def spread(self, values: Tensor, index: Tensor) -> Tensor:
        """The index, repeated for each number of a row."""
        return index.view(-1, *[1] * (values.ndim - 1)).expand_as(values)


def graphs(sizes: list[int], seed: int = 0, each: int = 3) -> Graphs:
    """With so many edges for each node, in an order that tells nothing."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    edges = [
        torch.randint(max(1, size), (2, each * size), generator=generator) + start
        for size, start in zip(sizes, starts, strict=True)
    ]
    joined = torch.cat(edges, 1)
    joined = joined[:, torch.randperm(joined.shape[1], generator=generator)]
    sample = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Graphs(torch.randn(len(sample), D, generator=generator), joined, sample)


def shuffled(g: Graphs) -> Graphs:
    """The same with its nodes in another order."""
    order = torch.randperm(len(g.x), generator=torch.Generator().manual_seed(len(g.x)))
    return Graphs(g.x[order], order.argsort()[g.edges], g.sample[order])


RAGGED, EQUAL = [3, 1, 4, 2, 5], [3] * B


def zeros(rows: int, h: Tensor) -> Tensor:
    return h.new_zeros(rows, *h.shape[1:])


def added(h: Tensor, g: Graphs) -> Tensor:
    return zeros(B, h).index_add(0, g.sample, h)


def half_added(h: Tensor, g: Graphs) -> Tensor:
    return zeros(B, h).index_add_(0, g.sample.int(), h, alpha=0.5)


def scattered(h: Tensor, g: Graphs) -> Tensor:
    return zeros(B, h).scatter_add(0, g.spread(h, g.sample), h)


def reduced(how: str, start: float = 0.0) -> Callable[[Tensor, Graphs], Tensor]:
    def pool(h: Tensor, g: Graphs) -> Tensor:
        whole = torch.full((B, D), start)
        return whole.scatter_reduce(0, g.spread(h, g.sample), h, how, include_self=False)

    return pool


def put(h: Tensor, g: Graphs) -> Tensor:
    return zeros(B, h).index_put((g.sample,), h, accumulate=True)


def dense(h: Tensor, g: Graphs) -> Tensor:
    """Padded, as for attention."""
    most = int(g.sample.bincount().max())
    position = torch.cat([torch.arange(int(n)) for n in g.sample.bincount(minlength=B)])
    padded = zeros(B * most, h)
    padded[g.sample * most + position] = h
    return padded.view(B, most, D).tanh().sum(1)


def dense_but_for_a_slot(h: Tensor, g: Graphs) -> Tensor:
    """Padded, with one row more for what has no place."""
    most = int(g.sample.bincount().max())
    present = torch.arange(most) < g.sample.bincount(minlength=B)[:, None]
    padded = zeros(B * most + 1, h)
    padded[present.flatten().nonzero().squeeze(1)] = h
    return padded[:-1].view(B, most, D).cumsum(1).tanh().sum(1)


def by_a_mask(first: bool) -> Callable[[Tensor, Graphs], Tensor]:
    """Padded, with the samples first or second, and back."""

    def pool(h: Tensor, g: Graphs) -> Tensor:
        present = (
            torch.arange(int(g.sample.bincount().max())) < g.sample.bincount(minlength=B)[:, None]
        )
        padded = h.new_zeros(*(present if first else present.T).shape, D)
        padded = padded.index_put((present if first else present.T,), h)
        padded = padded.cumsum(1 if first else 0).tanh()
        rows = padded[present if first else present.T]
        sample = present.nonzero()[:, 0] if first else present.T.nonzero()[:, 1]
        return zeros(B, h).index_add(0, sample, rows)

    return pool


def all_but_one(h: Tensor, g: Graphs) -> Tensor:
    rows = torch.arange(1, len(h))
    return zeros(B, h).index_add(0, g.sample[rows], h[(rows - len(h)).int()].sigmoid())


def in_parts(h: Tensor, g: Graphs) -> Tensor:
    """Each row is read by one of two."""
    is_first = torch.arange(len(h)) % 3 == 1
    first, others = is_first.nonzero().squeeze(1), is_first.logical_not().nonzero().squeeze(1)
    pooled = zeros(B, h).index_add(0, g.sample[first], h[first].sigmoid())
    return pooled.index_add(0, g.sample[others], h[others].tanh())


def nested(h: Tensor, g: Graphs) -> Tensor:
    """Few rows, and more of them."""
    few, more = torch.arange(0, len(h), 4), torch.arange(0, len(h), 2)
    pooled = zeros(B, h).index_add(0, g.sample[more], h[more].tanh())
    return pooled.index_add(0, g.sample[few], h[few].sigmoid())


POOLS = {
    "all but one": all_but_one,
    "in parts": in_parts,
    "nested": nested,
    "index_add": added,
    "index_add with a factor": half_added,
    "scatter_add": scattered,
    "mean": reduced("mean"),
    "maximum": reduced("amax", -9.0),
    "index_put": put,
    "dense": dense,
    "dense but for a slot": dense_but_for_a_slot,
    "by a mask": by_a_mask(first=True),
}


def message(h: Tensor, g: Graphs) -> Tensor:
    source, target = g.edges
    return h + torch.zeros_like(h).index_add(0, target, h[source].tanh())


def gathered(h: Tensor, g: Graphs) -> Tensor:
    source, target = g.edges
    h = h.view(len(h), 2, D // 2)
    along = h.index_select(0, source) * h.gather(0, g.spread(h[target], target))
    return torch.zeros_like(h).scatter_add(0, g.spread(along, target), along).flatten(1)


def attended(h: Tensor, g: Graphs) -> Tensor:
    """A softmax over the edges that end in a node."""
    source, target = g.edges
    score = (h[source] * h[target]).sum(1)
    largest = score.new_full((len(h),), -9.0).scatter_reduce(0, target, score.detach(), "amax")
    weight = (score - largest[target]).exp()
    total = weight.new_zeros(len(h)).index_add(0, target, weight) + 1e-9
    return torch.zeros_like(h).index_add(0, target, h[source] * (weight / total[target])[:, None])


def some_kept(h: Tensor, g: Graphs) -> Tensor:
    """As a pooling of graphs keeps the highest nodes; the rest are read nowhere."""
    kept = (g.x[:, 0] > 0).nonzero().squeeze(1).flip(0)
    return zeros(len(h), h).index_add(0, kept, h[kept] * h[kept].sigmoid())


def masked(h: Tensor, g: Graphs) -> Tensor:
    mask = g.x[:, 0] > 0
    out = h.clone()
    out[mask] = h[mask].tanh()
    return out


MOVES = {
    "messages": message,
    "gathered": gathered,
    "attended": attended,
    "counted from the end": lambda h, g: h[torch.arange(len(h)) - len(h)].tanh(),
    "some kept": some_kept,
    "masked": masked,
    "one of each row": lambda h, g: h * h[torch.arange(len(h)), g.sample % D].unsqueeze(1),
}


class Net(nn.Module):
    """Layers between two moves, and an answer for each sample."""

    def __init__(self, move: Callable[[Tensor, Graphs], Tensor], pool: Callable) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm, self.scale = nn.LayerNorm(D), nn.Parameter(torch.randn(D))
        self.move, self.pool = move, pool

    def forward(self, g: Graphs) -> Tensor:
        h = self.move(self.first(g.x), g)
        h = self.move(self.norm(F.elu(self.second(h))) * self.scale, g)
        return self.head(self.pool(h, g))


def losses_of(net: nn.Module, g: Graphs) -> Tensor:
    return net(g).square().sum(1)


def optimizer_of(net: nn.Module, **options) -> IRWOptimizer:
    return IRWOptimizer(
        torch.optim.SGD(net.parameters(), lr=1e-4), alpha=ALPHA, model=net, **options
    )


def step(net: nn.Module, optimizer: IRWOptimizer, g: Graphs) -> None:
    truth = reference.step(losses_of(net, g), net.parameters(), ALPHA)
    optimizer.zero_grad()
    optimizer.backward(losses_of(net, g))
    agree(optimizer, net, truth)
    optimizer.step()


def is_quick(net: nn.Module, optimizer: IRWOptimizer) -> bool:
    return optimizer.engine.covered_parameters() == set(net.parameters())


@pytest.mark.parametrize("sizes", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("move", MOVES)
def test_every_way_to_move_rows_has_quick_products(move, sizes):
    torch.manual_seed(0)
    net, g = Net(MOVES[move], added), shuffled(graphs(sizes))
    products.check(net, lambda net: losses_of(net, g), "auto", 1e-10, B)
    optimizer = optimizer_of(net)
    for seed in range(3):
        step(net, optimizer, graphs(sizes, seed))
        step(net, optimizer, shuffled(graphs(sizes, seed)))
    assert is_quick(net, optimizer)


@pytest.mark.parametrize("sizes", [RAGGED, EQUAL, [4, 0, 2, 6, 3]], ids=["ragged", "equal", "none"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_way_to_a_sample_has_quick_products(pool, sizes):
    torch.manual_seed(0)
    net, g = Net(message, POOLS[pool]), graphs(sizes)
    products.check(net, lambda net: losses_of(net, g), "auto", 1e-10, B)
    optimizer = optimizer_of(net)
    for seed in range(3):
        step(net, optimizer, graphs(sizes, seed))
    assert is_quick(net, optimizer)


def wrong_claims(losses: Tensor) -> list[str]:
    """Where a number that is said to be one sample's counts in the loss of another."""
    graph = walk(losses)
    batch = follow_batch(losses, graph)
    assert batch.rows is not None
    wrong: list[str] = []
    if not batch.followed:
        return wrong
    for (place, output), (stride, owners) in batch.places.items():
        edge = GradientEdge(graph.order[place], output)
        for sample, loss in enumerate(losses if stride else ()):
            gradient = torch.autograd.grad(loss, edge, retain_graph=True, materialize_grads=True)[0]
            read = gradient.flatten().nonzero().flatten()
            row = read // stride % len(batch.rows.owners[owners])
            if not (batch.rows.owners[owners][row] == sample).all():
                wrong.append(f"{edge.node.name()} {tuple(gradient.shape)}")
    return wrong


def met(h: Tensor, g: Graphs) -> Tensor:
    """By one edge, behind others that keep apart."""
    edges = g.edges.clone()
    edges[0, -1], edges[1, -1] = 0, len(h) - 1
    return message(h, g._replace(edges=edges))


def two_indices(h: Tensor, g: Graphs) -> Tensor:
    """Of the same place, the same shape, and another stride."""
    pairs = torch.stack([g.edges[0], g.edges[0].flip(0)], 1)
    return h + torch.zeros_like(h).index_add(
        0, pairs[:, 0], h[pairs[:, 0]] * h[pairs.flatten()[: len(pairs)]]
    )


def not_one_index_for_all(h: Tensor, g: Graphs) -> Tensor:
    index = torch.arange(len(h))[:, None].repeat(1, D)
    index[:, 1] = index[:, 1].flip(0)
    return h.gather(0, index).sigmoid()


def met_alone(h: Tensor, g: Graphs) -> Tensor:
    source, target = g.edges.clone()
    source[-1], target[-1] = 0, len(h) - 1
    return torch.zeros_like(h).index_add(0, target, h[source].tanh())


def kept_of_messages(h: Tensor, g: Graphs) -> Tensor:
    """Some edges are read by nobody, and their sources by others."""
    source, target = g.edges
    around = torch.zeros_like(h).index_add(0, target, h[source].tanh())
    kept = (g.x[:, 0] > 0).nonzero().squeeze(1)
    return zeros(len(h), h).index_add(0, kept, around[kept].sigmoid())


def two_masks(h: Tensor, g: Graphs) -> Tensor:
    """Of as many rows."""
    first = torch.arange(len(h)) < 3
    one, other = torch.zeros_like(h), torch.zeros_like(h)
    one[first], other[first.flip(0)] = h[first].sigmoid(), h[first.flip(0)].tanh()
    return h + one + other


def one_index_of_two(h: Tensor, g: Graphs) -> Tensor:
    """Of nodes, and of samples."""
    index, pooled = torch.arange(B), added(h, g)
    few = zeros(B, h).index_add(0, g.sample[index], h[index].sigmoid())
    return (few + pooled[index].tanh())[g.sample]


def by_elements(h: Tensor, g: Graphs) -> Tensor:
    return h + h.view(-1)[torch.arange(h.numel())].view(h.shape).sigmoid()


def put_beside(h: Tensor, g: Graphs) -> Tensor:
    """Into the rows of others, from the end."""
    out = h.clone()
    out[-1] = 0
    return out.index_put((torch.tensor([-1, 0]),), h[[-1, 0]].sigmoid(), accumulate=True)


def as_rows_and_in_turns(h: Tensor, g: Graphs) -> Tensor:
    return h + h.view(-1)[torch.arange(h.numel()) % len(h)].view(h.shape)


def from_the_end(h: Tensor, g: Graphs) -> Tensor:
    return h + h[g.edges[0][: len(h)].sort().values * 0 + torch.arange(len(h)) - len(h)].sigmoid()


def some_from_the_end(h: Tensor, g: Graphs) -> Tensor:
    return zeros(len(h), h).index_add(
        0, torch.arange(1, len(h)), h[torch.arange(1, len(h)) - len(h)]
    )


TANGLED = {
    "met": met,
    "met alone": met_alone,
    "kept of messages": kept_of_messages,
    "two masks": two_masks,
    "one index of two": one_index_of_two,
    "by elements": by_elements,
    "one vector for many": lambda h, g: h.index_put((torch.arange(D),), h.mean(0)) * h,
    "one row": lambda h, g: h.index_add(0, g.sample[-1:], h[-1:] * h[-1:].mean(1, keepdim=True)),
    "one row for many": lambda h, g: h.index_put((torch.arange(3),), h[:1]),
    "swapped": lambda h, g: h * h.flip(0)[torch.arange(len(h))][torch.arange(len(h)).flip(0) // 2],
    "two indices": two_indices,
    "not one index for all": not_one_index_for_all,
    "put beside": put_beside,
    "turns": as_rows_and_in_turns,
    "from the end": from_the_end,
    "some from the end": some_from_the_end,
    "nodes in one sum": lambda h, g: h + zeros(1, h).index_add(0, g.sample * 0, h),
    "shifted": lambda h, g: torch.cat([h[:1], h[1:] * h[:-1]]),
    "every other": lambda h, g: zeros(len(h), h).index_add(0, torch.arange(0, len(h), 2), h[::2]),
}


@pytest.mark.parametrize("sizes", [RAGGED, EQUAL, [1] * B], ids=["ragged", "equal", "one each"])
@pytest.mark.parametrize(
    ("move", "pool"),
    [
        (m, p)
        for m in MOVES | TANGLED
        for p in POOLS
        if "message" in m or p in ("index_add", "mean")
    ],
)
def test_what_is_said_of_rows_is_so(move, pool, sizes):
    torch.manual_seed(0)
    net = Net((MOVES | TANGLED)[move], POOLS[pool])
    for g in (graphs(sizes), shuffled(graphs(sizes, 1))):
        assert wrong_claims(losses_of(net, g)) == []


def test_rows_that_stand_second():
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(D // 2, 3), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.randn(2, 1, 3))

        def forward(self, g: Graphs) -> Tensor:
            h = self.first(g.x.view(len(g.x), 2, D // 2).transpose(0, 1).contiguous()).relu()
            h = h * self.scale
            return self.last(h.new_zeros(2, B, 3).index_add(1, g.sample, h).sum(0))

    net = Heads()
    for g in (graphs(RAGGED), shuffled(graphs(RAGGED)), graphs(EQUAL)):
        products.check(net, lambda net, g=g: losses_of(net, g), "auto", 1e-10, B)
        optimizer = optimizer_of(net)
        step(net, optimizer, g)
        assert is_quick(net, optimizer)
        optimizer.detach()


@pytest.mark.parametrize("move", TANGLED)
def test_steps_along_tangled_rows(move):
    torch.manual_seed(0)
    net = Net(TANGLED[move], added)
    optimizer = optimizer_of(net)
    for seed in range(6):
        step(net, optimizer, graphs(RAGGED if seed % 2 else RAGGED[::-1], seed))


def test_a_mask_with_the_samples_second():
    torch.manual_seed(0)
    net = Net(lambda h, g: h, by_a_mask(first=False))
    optimizer = optimizer_of(net)
    for seed in range(3):
        g = graphs(EQUAL, seed)
        step(net, optimizer, g._replace(sample=g.sample.view(B, -1).T.flatten()))
        assert is_quick(net, optimizer)


def test_one_vector_put_into_as_many_rows_as_it_is_long():
    """It is no rows of the samples."""
    torch.manual_seed(0)

    def blank(h: Tensor, g: Graphs) -> Tensor:
        out = h.clone()
        out[torch.arange(D)] = h.detach().mean() * net.scale
        return out

    net = Net(blank, added)
    optimizer = optimizer_of(net)
    for seed in range(3):
        step(net, optimizer, graphs(RAGGED, seed))


def test_sizes_that_differ_from_step_to_step_in_a_graph_of_one_kind():
    torch.manual_seed(0)
    net = Net(message, added)
    optimizer = optimizer_of(net)
    for seed in range(12):
        sizes = RAGGED[seed % B :] + RAGGED[: seed % B]
        step(net, optimizer, graphs(EQUAL if seed % 4 == 3 else sizes, seed))
    assert len(optimizer.engine.plans) == 1
    assert is_quick(net, optimizer)


@pytest.mark.parametrize("met_at", [1, 3, 5, 6])
def test_samples_that_come_to_meet_in_a_graph_of_one_kind(met_at):
    torch.manual_seed(0)
    net = Net(message, added)
    optimizer = optimizer_of(net)
    for seed in range(8):
        g = graphs(RAGGED, seed)
        if seed == met_at:
            g.edges[0, 0], g.edges[1, 0] = 0, len(g.x) - 1  # from the first sample to the last
        step(net, optimizer, g)


def test_nodes_of_two_samples_in_one_sum():
    torch.manual_seed(0)
    net = Net(lambda h, g: h + h.new_zeros(1, D).index_add(0, g.sample * 0, h), added)
    optimizer = optimizer_of(net)
    for seed in range(3):
        step(net, optimizer, graphs(RAGGED, seed))
    assert not is_quick(net, optimizer)


def test_two_batches_of_one_kind_on_their_way():
    torch.manual_seed(0)
    net = Net(message, added)
    optimizer = optimizer_of(net)
    first, second = graphs(RAGGED, 1), graphs(RAGGED[::-1], 2)
    for _ in range(4):
        truths = [
            reference.step(losses_of(net, g), net.parameters(), ALPHA) for g in (first, second)
        ]
        optimizer.zero_grad()
        pending = [losses_of(net, g) for g in (first, second)]
        for losses in pending:
            optimizer.backward(losses)
        expected = [sum(parts) for parts in zip(*(t.gradients for t in truths), strict=True)]
        for p, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_one_sample_that_has_most_rows_costs_no_padding():
    torch.manual_seed(0)
    net, sizes = Net(message, added), [40, 1, 1, 1, 1]
    optimizer = optimizer_of(net)
    for seed in range(3):
        step(net, optimizer, graphs(sizes, seed))
    assert not is_quick(net, optimizer)


class Experts(nn.Module):
    """Each token goes to two of three experts, weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(D, 3), nn.Linear(D, 2)
        self.experts = nn.Parameter(torch.randn(3, D, D))

    def forward(self, g: Graphs) -> Tensor:
        tokens = g.x[: 3 * B].view(B, 3, D).flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(1).topk(2)
        out = torch.zeros_like(tokens)
        for number in range(3):
            rows, position = (chosen == number).nonzero(as_tuple=True)
            made = F.linear(tokens[rows], self.experts[number]).relu()
            out.index_add_(0, rows, made * weights[rows, position, None])
        return self.head(out.view(B, 3, D).mean(1))


def test_tokens_of_experts():
    torch.manual_seed(0)
    net = Experts()
    optimizer = optimizer_of(net)
    for seed in range(6):
        step(net, optimizer, graphs(EQUAL, seed))
    assert is_quick(net, optimizer)


class Bags(nn.Module):
    """Pictures in bags of all sizes, of which attention takes a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.score, self.head = nn.Conv2d(1, 3, 2), nn.Linear(3, 1), nn.Linear(3, 2)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, g: Graphs) -> Tensor:
        h = self.norm(self.read(g.x.view(-1, 1, 2, 2).repeat(1, 1, 2, 2))).relu().mean((2, 3))
        weight = self.score(h.tanh()).exp()
        total = weight.new_zeros(B, 1).index_add(0, g.sample, weight)
        return self.head(h.new_zeros(B, 3).index_add(0, g.sample, h * weight / total[g.sample]))


def test_pictures_in_bags():
    torch.manual_seed(0)
    net, g = Bags(), graphs(RAGGED)
    products.check(net, lambda net: losses_of(net, g), "auto", 1e-10, B)
    optimizer = optimizer_of(net)
    step(net, optimizer, g)
    assert is_quick(net, optimizer)


def test_outliers_among_graphs():
    torch.manual_seed(0)
    net, twin = Net(message, added), Net(message, added)
    twin.load_state_dict(net.state_dict())
    ours = optimizer_of(net, outliers=DBSCANFilter(eps=0.5, min_samples=2))
    loop = optimizer_of(twin, outliers=DBSCANFilter(eps=0.5, min_samples=2), engine="autodiff")
    for seed in range(3):
        for model, optimizer in ((net, ours), (twin, loop)):
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, graphs(RAGGED, seed)))
            optimizer.step()
        torch.testing.assert_close(ours.last_step.weights, loop.last_step.weights)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
