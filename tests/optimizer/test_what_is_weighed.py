"""Only losses of the model are weighed: inputs and other networks get the ordinary gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from models import mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from irw_optim import IRWOptimizer
from irw_optim.gradients import backward_passes

B, ALPHA = 8, 0.3


def network(width_in: int, width_out: int, norm: bool = False) -> nn.Module:
    return mlp(width_in, 6, width_out, norm=nn.BatchNorm1d if norm else None).double()


def attached(model: nn.Module, criterion: nn.Module, **options) -> IRWOptimizer:
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion, **options)


def gradients_are(model: nn.Module, expected: Sequence[Tensor]) -> None:
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 4).double(), torch.randint(3, (B,))


OPTIONS = {
    "plain": {},
    "by the losses alone": {"weighting": "cvar"},
    "warming up": {"warmup_steps": 100},
    "autodiff": {"engine": "autodiff"},
    "accumulating": {"accumulation_steps": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("norm", [False, True], ids=["apart", "mixed"])
def test_an_attack_gets_the_ordinary_gradient_of_the_inputs(options, reduction, norm):
    model, (x, y) = network(4, 3, norm), data()
    own = nn.CrossEntropyLoss(reduction=reduction)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(own(copy.deepcopy(model)(x), y), x)
    criterion = copy.deepcopy(own)
    optimizer = attached(model, criterion, **options)
    (found,) = torch.autograd.grad(criterion(model(x), y), x)
    torch.testing.assert_close(found, expected)
    assert optimizer.last_step is None  # nothing was weighed
    with pytest.raises(RuntimeError, match="found no gradient"):
        optimizer.step()


def test_inputs_and_parameters_in_one_pass():
    model, (x, y) = network(4, 3), data()
    twin = copy.deepcopy(model)
    x.requires_grad_()
    losses = F.cross_entropy(twin(x), y, reduction="none", ignore_index=0)
    (expected,) = torch.autograd.grad(losses.sum() / (y != 0).sum(), x, retain_graph=True)
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    optimizer = attached(model, criterion)
    criterion(model(x), y).backward()
    torch.testing.assert_close(x.grad, expected)
    record = optimizer.last_step
    weighted = torch.autograd.grad(losses @ record.weights, list(twin.parameters()))
    gradients_are(model, weighted)


@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 0], ids=["all count", "some ignored"])
def test_inputs_get_the_ordinary_gradient_in_every_step(factor, reduction, ignored):
    """Also in those in which it comes by the pass to the layers, and twice where that is kept."""
    model = network(4, 3)
    own = nn.CrossEntropyLoss(reduction=reduction, ignore_index=ignored)
    criterion = copy.deepcopy(own)
    optimizer = attached(model, criterion)
    for _ in range(7):
        (x, y), twin, heard = data(), copy.deepcopy(model), []
        x.requires_grad_()
        (expected,) = torch.autograd.grad(factor * own(twin(x), y), x)
        x.register_hook(heard.append)
        loss = factor * criterion(model(x), y)
        loss.backward(retain_graph=True)
        torch.testing.assert_close(x.grad, expected)
        loss.backward()
        torch.testing.assert_close(x.grad, 2 * expected)
        assert len(heard) == 2
        optimizer.step()


def test_of_two_inputs_each_gets_its_own_gradient():
    """Of one loss, one pass after the other."""
    model, criterion = network(4, 3), nn.CrossEntropyLoss()
    optimizer = attached(model, criterion)
    for _ in range(7):
        (x, y), z = data(), torch.randn(B, 4).double().requires_grad_()
        x.requires_grad_()
        expected = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(x + 2 * z), y), [x, z])
        loss = criterion(model(x + 2 * z), y)
        loss.backward(inputs=[*model.parameters(), x], retain_graph=True)
        loss.backward(inputs=[*model.parameters(), z])
        torch.testing.assert_close([x.grad, z.grad], list(expected))
        optimizer.step()


def test_the_gradient_of_the_inputs_costs_no_pass_of_its_own(monkeypatch):
    model, (x, y), criterion, passes = network(4, 3), data(), nn.CrossEntropyLoss(), []
    x.requires_grad_()
    optimizer = attached(model, criterion)
    model[0].register_full_backward_hook(lambda *_: passes.append("heard"))
    pull_back = backward_passes.pull_back
    monkeypatch.setattr(
        backward_passes,
        "pull_back",
        lambda *given: [passes.append("unheard"), pull_back(*given)][1],
    )
    for _ in range(6):
        passes.clear()
        criterion(model(x), y).backward()
        optimizer.step()
    assert passes == ["heard"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_network_in_front_gets_the_ordinary_gradient(options):
    generator, model, (z, _) = network(4, 5), network(5, 1), data()
    one = torch.ones(B, 1).double()
    own = F.binary_cross_entropy_with_logits(model(generator(z)), one)
    expected = torch.autograd.grad(own, list(generator.parameters()))
    criterion = nn.BCEWithLogitsLoss()
    optimizer = attached(model, criterion, **options)
    for _ in range(optimizer.accumulation_steps):
        generator.zero_grad()
        criterion(model(generator(z)), one).backward()
    gradients_are(generator, expected)
    assert all(p.grad is not None for p in model.parameters())


def test_a_discriminator_is_weighed_and_its_generator_is_not():
    generator, model, (z, _) = network(4, 5), network(5, 1), data()
    criterion, one = nn.BCEWithLogitsLoss(), torch.ones(B, 1).double()
    optimizer = attached(model, criterion)
    twin = copy.deepcopy(model)
    output = twin(generator(z).detach())
    losses = F.binary_cross_entropy_with_logits(output, one, reduction="none").squeeze(1)
    truth = reference.step(losses, twin.parameters(), ALPHA)
    criterion(model(generator(z)), one).backward()
    agree(optimizer, model, truth)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_the_model_frozen_the_loss_is_an_ordinary_one(options):
    generator, model, (z, _) = network(4, 5), network(5, 1), data()
    one = torch.ones(B, 1).double()
    own = F.binary_cross_entropy_with_logits(model(generator(z)), one)
    expected = torch.autograd.grad(own, list(generator.parameters()))
    criterion = nn.BCEWithLogitsLoss()
    optimizer = attached(model, criterion, **options)
    model.requires_grad_(False)
    loss = criterion(model(generator(z)), one)
    torch.testing.assert_close(loss.detach(), own.detach())
    loss.backward()
    gradients_are(generator, expected)
    assert optimizer.last_step is None


def test_the_criterion_on_another_network_altogether():
    model, other, (x, y) = network(4, 3), network(4, 3), data()
    expected = torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))
    criterion = nn.CrossEntropyLoss()
    optimizer = attached(model, criterion)
    criterion(other(x), y).backward()
    gradients_are(other, expected)
    assert optimizer.last_step is None
    with pytest.raises(RuntimeError, match="found no gradient"):
        optimizer.step()


@pytest.mark.parametrize("shared", [False, True])
def test_two_losses_of_a_logical_batch(shared):
    """On one forward or on two: each loss is a pass, and the four make one batch."""
    trunk, first, second = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
    model = nn.ModuleList([trunk, first, second]).double()
    twin = copy.deepcopy(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = attached(model, criterion, accumulation_steps=4)
    parts = []
    for _ in range(2):
        x, y = data()
        hidden = trunk(x).tanh()
        again = hidden if shared else trunk(x).tanh()
        (criterion(first(hidden), y) + 0.4 * criterion(second(again), y)).backward()
        parts += [F.cross_entropy(twin[i](twin[0](x).tanh()), y, reduction="none") for i in (1, 2)]
    optimizer.finish()
    record = optimizer.last_step
    found = record.losses.view(4, B)
    # Autograd decides which of two losses of a sum comes first.
    by_value = {round(float(p.detach().sum()), 9): p for p in parts}
    losses = torch.cat([by_value[round(float(row.sum()), 9)] for row in found])
    truth = reference.step(losses, twin.parameters(), ALPHA)
    assert record.worst_off.tolist() == truth.worst_off.tolist()
    torch.testing.assert_close(record.weights, truth.weights.to(record.weights.dtype))
    total = 2 * (1 + 0.4)  # the factors of the four passes
    gradients = torch.autograd.grad(total * (losses @ truth.weights), list(twin.parameters()))
    gradients_are(model, gradients)


def along(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """How a loss changes with the parameters, forwards, and the gradient of each sample's."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(value) for name, value in values.items()}

    def loss(parameters, inputs=x, targets=y):
        return criterion(functional_call(model, parameters, (inputs,)), targets)

    def of_one(parameters, inputs, target):
        return loss(parameters, inputs[None], target[None])

    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(p, ones[n]) for n, p in model.named_parameters()}
        tangent = forward_ad.unpack_dual(loss(dual)).tangent
    rows = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(values, x, y)
    return {
        "jvp": torch.func.jvp(loss, (values,), (ones,))[1],
        "dual numbers": tangent,
        "gradient": torch.cat([g.flatten() for g in torch.func.grad(loss)(values).values()]),
        "rows": torch.cat([row.flatten(1) for row in rows.values()], 1),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's formulas for dual numbers
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_function_transforms_and_forward_mode_see_an_ordinary_criterion(options):
    model, (x, y) = network(4, 3), data()
    expected = along(nn.CrossEntropyLoss(), model, x, y)
    criterion = nn.CrossEntropyLoss()
    optimizer = attached(model, criterion, **options)
    found = along(criterion, model, x, y)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert optimizer.last_step is None
    for _ in range(optimizer.accumulation_steps):
        criterion(model(x), y).backward()
    assert optimizer.last_step is not None
