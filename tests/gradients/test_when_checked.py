"""When the products are compared with autograd, and what the log says of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from irw_optim import IRWOptimizer
from irw_optim.gradients import coverage, loss_gradients
from irw_optim.gradients.mixing import follow_batch

B, ALPHA, STEPS = 6, 0.3, 64
AT_POWERS_OF_TWO = 7  # 1, 2, 4, ..., 64


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *between, nn.Linear(8, 2)).double()


@pytest.fixture
def checks(monkeypatch) -> list[int]:
    """Grows by one at every comparison."""
    counted: list[int] = []
    compare = loss_gradients.compare

    def counting(*args):
        counted.append(1)
        return compare(*args)

    monkeypatch.setattr(loss_gradients, "compare", counting)
    return counted


def train(model: nn.Module, steps: int = STEPS, inputs: Callable[[], Tensor] | None = None) -> None:
    """Every step equal to the loop."""
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model)
    for step in range(steps):
        x = torch.randn(B, 4).double() if inputs is None else inputs()
        y = torch.randint(2, (B,))
        torch.manual_seed(step)
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, trainable(model), ALPHA)
        torch.manual_seed(step)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        agree(optimizer, model, truth)
        optimizer.step()


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


class LayerDrop(nn.Module):
    """Skips each of its blocks at random."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])

    def forward(self, h: Tensor) -> Tensor:
        for block, runs in zip(self.blocks, torch.rand(5) < 0.6, strict=True):
            h = h + block(h).tanh() if runs else h
        return h


def pruned() -> nn.Module:
    model = mlp(nn.Linear(8, 8))
    prune.random_unstructured(model[2], "weight", 0.4)
    return model


def leaf_inputs() -> Tensor:
    return torch.randn(B, 4, dtype=torch.float64, requires_grad=True)


KINDS = {
    "layers": (mlp, None, AT_POWERS_OF_TWO),
    "inputs that require a gradient": (mlp, leaf_inputs, AT_POWERS_OF_TWO),
    "weight norm": (
        lambda: mlp(parametrizations.weight_norm(nn.Linear(8, 8))),
        None,
        AT_POWERS_OF_TWO,
    ),
    "pruning": (pruned, None, AT_POWERS_OF_TWO),
    # Its five blocks are met one after the other.
    "blocks that are skipped": (lambda: mlp(LayerDrop()), None, AT_POWERS_OF_TWO + 5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_graph_is_checked_at_powers_of_two(kind, checks):
    make, inputs, most = KINDS[kind]
    train(make(), inputs=inputs)
    assert AT_POWERS_OF_TWO <= len(checks) <= most


class Opaque(torch.autograd.Function):
    """Nothing is known of what is written in Python."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return h * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.change(gradient * 2), None


class Doubled(nn.Module):
    """Its backward is a ``change`` of what arrives."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda g: g) -> None:
        super().__init__()
        self.change = change

    def forward(self, h: Tensor) -> Tensor:
        return Opaque.apply(h, self.change)


def test_a_function_in_python_is_compared_with_itself_in_every_step(checks):
    train(mlp(Doubled()), steps=STEPS)
    assert len(checks) == AT_POWERS_OF_TWO


CHANGES = {
    "a mean over the samples": lambda g: g - g.mean(0),
    "the next sample's": lambda g: g.roll(1, 0),
    "a sign": torch.sign,
    "one that is clipped": lambda g: g.clamp(max=float(g.max()) / 2),
    "a common norm": lambda g: g / g.norm(),
    "none": lambda g: None,
    "in place": lambda g: g.sub_(g.sum(0)),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("late", [3, 7])
def test_a_function_that_begins_to_mix_is_noticed_at_once(kind, late, checks):
    """At steps that are no powers of two."""
    model, turn = mlp(Doubled()), [0]

    def inputs() -> Tensor:
        turn[0] += 1
        if turn[0] == late:
            model[2].change = CHANGES[kind]
        return torch.randn(B, 4).double()

    if kind in NOT_LINEAR:
        comparisons_before = late.bit_length()
        train_without_the_loop(model, late, inputs)
        assert len(checks) == comparisons_before + 1
    else:
        train(model, late + 1, inputs)


NOT_LINEAR = {"a sign", "one that is clipped", "a common norm"}
"""Alone a sample has another gradient than among others: there is no loop to compare with."""


def train_without_the_loop(model: nn.Module, steps: int, inputs: Callable[[], Tensor]) -> None:
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model)
    for _ in range(steps):
        losses = F.cross_entropy(model(inputs()), torch.randint(2, (B,)), reduction="none")
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()


class Crossed(torch.autograd.Function):
    """Two inputs, two outputs, of which one goes nowhere."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, g)
        return h * g, h + g

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        h, g = ctx.saved_tensors
        return product * g + total, product * h + total


class TimeFirst(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.stack([h, h.sin(), h.cos()], self.dim)
        product, _ = Crossed.apply(self.one(h).tanh(), self.other(h))
        return product.mean(self.dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_function_of_several_inputs_and_outputs(dim, checks):
    train(mlp(TimeFirst(dim)), steps=9)
    assert len(checks) == 4


def test_where_samples_surely_meet_nothing_relies_on_a_check(checks):
    train(mlp(nn.BatchNorm1d(8)), steps=9)
    assert not checks


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, h: Tensor) -> Tensor:
        chosen = torch.randint(3, (len(h),))
        output = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            output = output.index_add(0, rows, expert(h[rows]))
        return output


LOGS = {
    "layers": (mlp, 0),
    "experts": (lambda: mlp(Experts()), 1),
    "blocks that are skipped": (lambda: mlp(LayerDrop(), nn.BatchNorm1d(8)), 2),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(8)), 2),  # what it has, and what it does to others
}


@pytest.mark.parametrize("name", LOGS)
def test_the_log_speaks_once_for_a_model(name, caplog):
    caplog.set_level("INFO", "irw_optim")
    make, most = LOGS[name]
    train(make(), steps=12)
    assert len(caplog.records) <= most
    assert "differ" not in caplog.text  # no reader should take it for a defect


def test_a_physical_loss_says_it_once(caplog):
    """A loss of derivatives (PINN) uses the weights a second time, in the backward graph."""
    model = mlp()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model)

    def losses_of(x: Tensor) -> Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1) - u[:, 0]).square()

    for _ in range(5):
        x = leaf_inputs()
        truth = reference.step(losses_of(x), trainable(model), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(x))
        agree(optimizer, model, truth)
        optimizer.step()
    assert len(caplog.records) <= 1


def test_other_terms_are_named_with_their_share(caplog):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    shares = []
    for _ in range(3):
        x, y = torch.randn(B, 4).double(), torch.randint(2, (B,))
        optimizer.zero_grad()
        output = model(x)
        penalty = torch.autograd.grad(output.square().mean(), trainable(model), retain_graph=True)
        (criterion(output, y) + output.square().mean()).backward()
        total = torch.cat([p.grad.flatten() for p in trainable(model)])
        shares.append(100 * torch.cat([g.flatten() for g in penalty]).norm() / total.norm())
        optimizer.step()
    (record,) = caplog.records
    assert f"it has {float(shares[0]):.0f} % of the length" in record.getMessage()


@pytest.mark.parametrize("form", ["plain", "two weighted losses", "scaled", "accumulated"])
def test_without_other_terms_nothing_is_said(form, caplog):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    for _ in range(2):
        x, y = torch.randn(B, 4).double(), torch.randint(2, (B,))
        optimizer.zero_grad()
        output = model(x)
        loss = criterion(output, y)
        if form == "two weighted losses":
            loss = loss + criterion(2 * output, y)
        if form == "scaled":
            loss = 1024 * loss
        loss.backward()
        if form == "accumulated":
            criterion(model(x), y).backward()
        optimizer.step()
    assert not caplog.records


def test_a_known_graph_in_which_samples_meet_is_not_followed_again(monkeypatch):
    followed = []

    def counted(losses, graph):
        followed.append(graph)
        return follow_batch(losses, graph)

    monkeypatch.setattr("irw_optim.gradients.engine.follow_batch", counted)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    for size in (8, 8, 8, 5, 8, 5):
        optimizer.zero_grad()
        criterion(model(torch.randn(size, 4)), torch.randint(2, (size,))).backward()
        optimizer.step()
    assert len(followed) == 2  # a batch of 8, and one of 5


class Attends(nn.Module):
    """Tokens read each other."""

    def forward(self, h: Tensor) -> Tensor:
        h = h.unsqueeze(1)  # one head
        return F.scaled_dot_product_attention(h, h, h).squeeze(1)


FLATTENED = {
    "alone": (nn.Tanh(), lambda h: h.flatten(0, 1)),
    "in attention": (Attends(), lambda h: h.flatten(0, 1)),
    "in a recurrent layer": (nn.GRU(8, 8, batch_first=True), lambda h: h[0].reshape(-1, 8)),
    "time first": (nn.Tanh(), lambda h: h.transpose(0, 1).reshape(-1, 8)),
}


@pytest.mark.parametrize("kind", FLATTENED)
def test_losses_of_tokens_are_named(kind, caplog):
    between, flatten = FLATTENED[kind]
    model = nn.ModuleList([nn.Embedding(9, 8), between, nn.Linear(8, 9)])
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    for _ in range(2):
        hidden = flatten(model[1](model[0](torch.randint(9, (3, 5)))))
        optimizer.zero_grad()
        criterion(model[2](hidden), torch.randint(9, (15,))).backward()
        optimizer.step()
    shape = (5, 3, 8) if kind == "time first" else (3, 5, 8)
    assert caplog.text.count(f"15 losses come from numbers of shape {shape}") == 1


def test_directions_of_a_packed_recurrent_layer_are_no_rows(caplog):
    """Its last states come as (2, B, width), and B is a multiple of 2."""
    cell, head = nn.GRU(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)
    model, criterion = nn.ModuleList([cell, head]), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    lengths = torch.randint(1, 6, (10,))
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(10, 5, 3), lengths, batch_first=True, enforce_sorted=False
    )
    forwards, backwards = cell(packed)[1]
    criterion(head(torch.cat([forwards, backwards], 1)), torch.randint(2, (10,))).backward()
    optimizer.step()
    assert "losses come from" not in caplog.text


def test_losses_of_time_steps_are_named(caplog):
    model, criterion = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 2)]), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    for _ in range(2):
        optimizer.zero_grad()
        hidden, loss = torch.zeros(B, 8), 0.0
        for _ in range(12):
            hidden = model[0](torch.cat([torch.randn(B, 4), hidden], 1)).tanh()
            loss = loss + criterion(model[1](hidden), torch.randint(2, (B,)))
        loss.backward()
        optimizer.step()
    assert caplog.text.count("losses lead through one graph") == 1


def test_trainings_in_threads():
    failed: list[BaseException] = []

    def training(seed: int) -> None:
        try:
            model, criterion = mlp(), nn.CrossEntropyLoss()
            sgd = torch.optim.SGD(model.parameters(), 0.01)
            optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
            kept = []
            for _ in range(60):
                x, y = torch.randn(B, 4).double(), torch.randint(2, (B,))
                kept.append(criterion(model(x), y))  # some never go backward
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=training, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize(("precision", "passes"), [("highest", False), ("high", True)])
def test_products_are_compared_as_precisely_as_they_were_made(precision, passes):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        tolerance = coverage._tolerance(torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    of_tf32 = 2.0**-10 * 4  # a few roundings of ten bits
    assert (of_tf32 < tolerance) is passes


def test_half_precision_is_not_rejected_for_autograds_own_rounding(caplog):
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
    model.to(torch.bfloat16)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model)
    for _ in range(4):
        x, y = torch.randn(B, 300, 8).bfloat16(), torch.randint(2, (B,))
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x).mean(1), y, reduction="none"))
        optimizer.step()
    assert not caplog.records
    assert len(optimizer.engine.covered_parameters()) == 6


def test_half_precision_that_mixes_has_no_quick_products():
    class Centre(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h - h.mean(0)

    model = nn.Sequential(nn.Linear(8, 16), Centre(), nn.ReLU(), nn.Linear(16, 2)).bfloat16()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model)
    x, y = torch.randn(B, 8).bfloat16(), torch.randint(2, (B,))
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert not optimizer.engine.covered_parameters()


def test_saturated_probabilities_behind_a_batch_norm():
    """torch's second derivative of BCELoss is off where a probability is all but 0 or 1."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1), nn.Sigmoid()
    ).double()
    with torch.no_grad():
        model[2].weight.mul_(40)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.0), alpha=ALPHA, model=model)

    def losses_of(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(model(x), y, reduction="none").squeeze(1)

    for _ in range(3):
        x, y = torch.randn(B, 4).double(), torch.randint(2, (B, 1)).double()
        truth = reference.step(losses_of(x, y), trainable(model), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(losses_of(x, y))
        agree(optimizer, model, truth)
    assert not optimizer.engine.known.get("row_by_row")


def test_a_batch_without_any_gradient_but_rounding_is_no_reason_to_go_row_by_row(caplog):
    """Both sides of a product differ there; an operation that hides something differs at once."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return 1 - F.cosine_similarity(h, h.flip(0))

    model = Pairs().double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.01), alpha=ALPHA, model=model)
    one = torch.randn(4).double()
    for x in (torch.randn(B, 4).double(), one.repeat(B, 1), one[None], torch.randn(B, 4).double()):
        truth = reference.step(model(x), trainable(model), ALPHA)
        optimizer.zero_grad()
        optimizer.backward(model(x))
        if float(truth.G.abs().max()) > 1e-9:
            agree(optimizer, model, truth)
        assert not optimizer.engine.known.get("row_by_row")
    assert "double backward" not in caplog.text


def test_gradients_that_are_written_into_the_same_memory():
    """As recorded CUDA graphs do (`make_graphed_callables`)."""

    class Recorded(torch.autograd.Function):
        memory = torch.zeros(2, 4).double()

        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return x @ weight.t()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            Recorded.memory.copy_(gradient.t() @ x)
            return None, Recorded.memory

    weight = nn.Parameter(torch.randn(2, 4).double())
    model = nn.Module()
    model.weight = weight
    optimizer = IRWOptimizer(torch.optim.SGD([weight], 0.1), alpha=ALPHA, model=model)
    for _ in range(3):
        x, y = torch.randn(B, 4).double(), torch.randint(2, (B,))
        truth = reference.step(
            F.cross_entropy(x @ weight.t(), y, reduction="none"), [weight], ALPHA
        )
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(Recorded.apply(x, weight), y, reduction="none"))
        agree(optimizer, model, truth)
