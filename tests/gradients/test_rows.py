"""Rows that are made as the gradient arrives: exact, once, and nothing else is held for them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import reference
import torch
from agreement import agree
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim import IRWOptimizer
from irw_optim.gradients.ghost import check_inputs, ghost_gradients
from irw_optim.gradients.graph import walk
from irw_optim.gradients.hooks import hook_layers, sites_noted
from irw_optim.gradients.layers import LayerCall, RowsCall

B = 6


def image_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 2, stride=2, dilation=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 2, stride=2, output_padding=1),
        nn.InstanceNorm2d(2, affine=True),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


class Sequences(nn.Module):
    """More positions than features, after a layer that passes its gradient on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.second, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).tanh()).mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (image_model, (2, 9, 9)),
    "sequences": (Sequences, (20, 3)),
}


def made(case: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = CASES[case]
    x, y = torch.randn(B, *shape).double(), torch.randint(3, (B,))
    model = build()
    model(x.float())
    return model.double(), x, y


def captured(model: nn.Module, x: Tensor, y: Tensor):
    hooks = hook_layers(model)
    losses = F.cross_entropy(model(x), y, reduction="none")
    graph = walk(losses)
    graph.sites = sites_noted(graph.order)
    assert 0 < len(hooks) <= len(graph.sites)
    for call, _, shape, _ in graph.sites:
        call.settle(call.layouts(B, shape)[0], B)
    return losses, graph


@pytest.mark.parametrize("case", CASES)
def test_early_rows_are_those_of_the_whole_pass(case):
    model, x, y = made(case)
    losses, graph = captured(model, x, y)
    one = torch.ones((), dtype=x.dtype)
    kept = ghost_gradients(losses, graph.sites, one, retain_graph=True)
    expected = kept.gram()
    assert sum(type(call) is RowsCall for call in kept.calls) >= 3
    early = ghost_gradients(
        losses, graph.sites, one, retain_graph=False, reached=range(len(graph.sites))
    )
    assert [type(call) for call in early.calls] == [type(call) for call in kept.calls]
    torch.testing.assert_close(early.gram(), expected)
    empty = [s.call for s in graph.sites if not s.call.input.untyped_storage().nbytes()]
    assert len(empty) == sum(type(call) is RowsCall for call in early.calls)


class Steps(nn.Module):
    """One map at every step of time."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x[:, 0]
        for t in range(1, x.shape[1]):
            state = torch.tanh(self.own(state)).mul(2).add_(x[:, t])  # not its first version
        return self.last(state)


def test_nothing_of_steps_is_held_once_they_are_one():
    model, x, y = Steps().double(), torch.randn(B, 7, 3).double(), torch.randint(3, (B,))
    losses, graph = captured(model, x, y)
    one = torch.ones((), dtype=x.dtype)
    kept = ghost_gradients(losses, graph.sites, one, retain_graph=True)
    assert all(site.call.input.numel() for site in graph.sites)
    joined = ghost_gradients(losses, graph.sites, one, retain_graph=False)
    assert joined.reached == kept.reached == set(range(len(graph.sites)))
    steps = [s.call for s in graph.sites if model.own.weight in {*s.call.parameters.values()}]
    assert len(joined.calls) == len(graph.sites) - len(steps) + 1
    assert not any(call.input.numel() or call.output_gradient.numel() for call in steps)
    check_inputs(joined.calls)
    rows = {p: g.flatten(1) for p, g in joined.rows().items()}
    losses = F.cross_entropy(model(x), y, reduction="none")
    for sample, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, list(rows), retain_graph=True)
        for block, gradient in zip(rows.values(), expected, strict=True):
            torch.testing.assert_close(block[sample], gradient.flatten())


@pytest.mark.parametrize("case", CASES)
def test_rows_are_made_once_a_step(case, monkeypatch):
    times: list[LayerCall] = []
    make = RowsCall.__init__
    monkeypatch.setattr(
        RowsCall, "__init__", lambda self, call: (times.append(call), make(self, call))[1]
    )
    model, x, y = made(case)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model)
    for _ in range(3):  # the third step is not checked against autograd
        times.clear()
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert 3 <= len(times) == len({id(call) for call in times})


@pytest.mark.parametrize("case", CASES)
def test_steps_with_early_rows_follow_the_loop(case):
    model, x, y = made(case)
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model)
    for _ in range(4):
        twin = copy.deepcopy(model)
        losses = F.cross_entropy(twin(x), y, reduction="none")
        truth = reference.step(losses, twin.parameters(), 0.3)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        agree(optimizer, model, truth)
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_early_rows_of_two_passes_as_one(case):
    model, x, y = made(case)
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model, accumulation_steps=2
    )
    for _ in range(3):
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, model.parameters(), 0.3)
        optimizer.zero_grad()
        for half in (slice(3), slice(3, None)):
            optimizer.backward(F.cross_entropy(model(x[half]), y[half], reduction="none"))
        for p, gradient in zip(model.parameters(), truth.gradients, strict=True):
            torch.testing.assert_close(p.grad, 2 * gradient)  # two means, added up
        optimizer.step()


def test_a_layer_that_is_not_reached_any_more():
    class Sometimes(torch.autograd.Function):
        silent = False

        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None if Sometimes.silent else gradient

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(h + Sometimes.apply(self.norm(h)))

    model, x, y = Model().double(), torch.randn(B, 3).double(), torch.randint(3, (B,))
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), 0.1), alpha=0.3, model=model)
    for Sometimes.silent in (False, False, True):
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        truth = reference.step(losses, model.parameters(), 0.3)
        optimizer.backward(losses)
        agree(optimizer, model, truth)


@pytest.mark.parametrize("case", CASES)
def test_a_second_pass_with_another_factor_makes_its_own_rows(case):
    model, x, y = made(case)
    twin = copy.deepcopy(model)
    truth = reference.step(F.cross_entropy(twin(x), y, reduction="none"), twin.parameters(), 0.3)
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    # By ghost alone: "auto" would see an error in its check, and mend it by falling back.
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=model, criterion=criterion, engine="ghost")
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    (3 * loss).backward()
    for parameter in model.parameters():
        parameter.grad /= 3
    agree(optimizer, model, truth)
