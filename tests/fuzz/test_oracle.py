"""The oracle of the loops, against `reference` and against what can be said without it."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from fuzz_losses import expected
from fuzz_oracle import Loop
from models import mlp
from torch import Tensor, nn

ALPHA = 0.4


class World(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.before = model, nn.Linear(4, 4)


def loop(world: nn.Module, **options) -> Loop:
    criterion = nn.CrossEntropyLoss()

    def losses(*args):
        return expected(criterion, *args)

    owned = list(world.model.parameters())
    return Loop(world, losses, criterion, owned, 0.1, alpha=ALPHA, **options)


@pytest.fixture
def user() -> Loop:
    return loop(World(mlp(4, 5, 3)).double())


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4).double(), torch.randint(3, (size,))


def truth(user: Loop, x: Tensor, y: Tensor) -> reference.Step:
    model = copy.deepcopy(user.net)
    losses = F.cross_entropy(model(x), y, reduction="none")
    return reference.step(losses, model.parameters(), ALPHA)


def are(user: Loop, expected_gradients) -> None:
    for p, g in zip(user.net.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_plain_pass_is_the_reference(user):
    data = batch()
    step = truth(user, *data)
    loss = user.criterion(user.net(data[0]), data[1])
    torch.testing.assert_close(loss, step.losses.mean())
    user.backward(2 * loss)
    are(user, [2 * g for g in step.gradients])
    torch.testing.assert_close(user.decided[0].decision.weights, step.weights)


def test_two_calls_are_two_batches(user):
    first, second = batch(), batch(4)
    steps = truth(user, *first), truth(user, *second)
    losses = [user.criterion(user.net(x), y) for x, y in (first, second)]
    user.backward(losses[0] + 0.5 * losses[1])
    are(user, [a + 0.5 * b for a, b in zip(*(s.gradients for s in steps), strict=True)])


def test_inputs_and_other_networks_have_the_plain_gradient(user):
    x, y = batch()
    x.requires_grad_()
    before = user.world.before
    plain = F.cross_entropy(user.net(before(x)), y)
    wanted = torch.autograd.grad(plain, [x, *before.parameters()])
    user.backward(user.criterion(user.net(before(x)), y))
    for ours, its in zip([x, *before.parameters()], wanted, strict=True):
        torch.testing.assert_close(ours.grad, its)
    are(user, truth(user, before(x).detach(), y).gradients)


def test_accumulated_passes_are_one_batch(user):
    x, y = batch()
    accumulating = loop(user.world, accumulation_steps=2)
    for part in (slice(0, 3), slice(3, 6)):
        assert all(p.grad is None or not p.grad.any() for p in user.net.parameters())
        accumulating.backward(accumulating.criterion(user.net(x[part]), y[part]) / 2)
    are(user, truth(user, x, y).gradients)


def test_a_complex_parameter_is_two_real_ones():
    class Product(nn.Module):
        def __init__(self, w: Tensor, as_pairs: bool) -> None:
            super().__init__()
            self.w, self.as_pairs = nn.Parameter(w), as_pairs

        def forward(self, x):
            w = torch.view_as_complex(self.w) if self.as_pairs else self.w
            return (x @ w).abs()

    w = torch.randn(4, 3, 2).double()
    x, y = batch()
    sides = [
        loop(World(Product(w.clone(), True))),
        loop(World(Product(torch.view_as_complex(w.clone()), False))),
    ]
    for user in sides:
        user.backward(user.criterion(user.net(x.to(torch.complex128)), y))
    pairs, whole = (user.net.w.grad for user in sides)
    torch.testing.assert_close(torch.view_as_real(whole), pairs)


@pytest.mark.parametrize(("theirs", "is_right"), [([1, 2], True), ([2, 3], True), ([0, 1], False)])
def test_of_equal_losses_any_may_be_among_the_worst(user, theirs, is_right):
    losses = torch.tensor([0.0, 2.0, 2.0, 2.0, 1.0]).double()
    user.preferred = torch.zeros(5, dtype=torch.bool).index_fill(0, torch.tensor(theirs), True)
    rows = torch.randn(5, 7).double()
    chosen, tied = user.choice(losses, rows, torch.float64, list(range(5)))
    assert (chosen is user.preferred) is is_right
    assert tied is not is_right
