"""Hooks on activations hear one backward pass a step, of the ordinary size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irw_optim import IRWOptimizer
from irw_optim.gradients.coverage import equal

B, ALPHA, STEPS = 8, 0.3, 5


class Reversal(nn.Module):
    """Reverses the gradient by a hook, as adversarial adaptation does."""

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda gradient: -0.5 * gradient)
        return h


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, h: Tensor) -> Tensor:
        return checkpoint(self.inside, h, use_reentrant=False)


def built(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *between, nn.Linear(6, 3)).double()


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "quick products": built,
    "double backward": lambda: built(nn.BatchNorm1d(6)),
    "checkpointed": lambda: built(Checkpointed(nn.Linear(6, 6))),
    "checkpointed, double backward": lambda: built(
        Checkpointed(nn.Linear(6, 6)), nn.BatchNorm1d(6)
    ),
    "no double backward": lambda: built(nn.Hardswish(), nn.BatchNorm1d(6)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 4).double(), torch.randint(3, (B,))


def truth_of(model: nn.Module, x: Tensor, y: Tensor) -> reference.Step:
    twin = copy.deepcopy(model)
    losses = F.cross_entropy(twin(x), y, reduction="none")
    return reference.step(losses, twin.parameters(), ALPHA)


def attached(model: nn.Module, **options) -> tuple[IRWOptimizer, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion, **options), criterion


def heard_in(model: nn.Sequential, loss_of: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """What a module's hook, a tensor's hook and retain_grad get in one backward pass."""
    heard: list[Tensor] = []
    handle = model[1].register_full_backward_hook(lambda _, __, out: heard.append(out[0].clone()))
    hidden = model[1](model[0](x))
    hidden.register_hook(lambda gradient: heard.append(gradient.clone()))
    hidden.retain_grad()
    loss_of(model[2:](hidden)).backward()
    handle.remove()
    return [*heard, hidden.grad]


@every_model
def test_they_hear_one_gradient_of_the_ordinary_size(name):
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    optimizer, criterion = attached(model)
    for _ in range(STEPS):
        x, y = data()
        plain.load_state_dict(model.state_dict())
        ordinary = heard_in(plain, lambda out, y=y: F.cross_entropy(out, y), x)
        optimizer.zero_grad()
        heard = heard_in(model, lambda out, y=y: criterion(out, y), x)
        assert len(heard) == len(ordinary) == 3
        assert all(torch.equal(heard[0], other) for other in heard[1:])
        if name == "quick products":
            torch.testing.assert_close(heard[0], ordinary[0])
        else:  # the weighted gradient itself, or the ordinary one where that was compared
            ratio = float(heard[0].norm() / ordinary[0].norm())
            assert 1 / B < ratio < B
        optimizer.step()


@every_model
def test_the_step_is_exact_whether_anybody_listens_or_not(name):
    model = MODELS[name]()
    optimizer, criterion = attached(model)
    for _ in range(STEPS):
        x, y = data()
        truth = truth_of(model, x, y)
        optimizer.zero_grad()
        heard_in(model, lambda out, y=y: criterion(out, y), x)
        agree(optimizer, model, truth)
        optimizer.step()


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.BatchNorm1d(6)], ids=["quick", "slow"])
def test_a_hook_that_changes_the_gradient_changes_every_sample(norm, caplog):
    caplog.set_level("INFO", "irw_optim")
    model = built(Reversal(), norm())
    optimizer, criterion = attached(model)
    for _ in range(STEPS):
        x, y = data()
        truth = truth_of(model, x, y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        agree(optimizer, model, truth)
        optimizer.step()
    assert caplog.text.count("changes the gradient") == 1


def test_a_logical_batch_lets_each_pass_be_heard_once():
    model = built()
    optimizer, criterion = attached(model, accumulation_steps=2)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = data()
            heard = heard_in(model, lambda out, y=y: criterion(out, y) / 2, x)
            assert len(heard) == 3
        optimizer.step()


@every_model
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_detection_has_nothing_to_report(name):
    model = MODELS[name]()
    optimizer, criterion = attached(model)
    for _ in range(3):
        x, y = data()
        optimizer.zero_grad()
        with torch.autograd.detect_anomaly():
            criterion(model(x), y).backward()
        optimizer.step()


def test_gradients_that_are_only_rounding_are_no_sign_of_a_hook():
    """A bias in front of a normalisation has none but what rounding leaves, in any order."""
    weight, bias = torch.randn(4, 4), torch.randn(4)
    noise, other = 1e-9 * torch.randn(4), 1e-9 * torch.randn(4)
    assert equal([weight, bias], [weight, noise], [weight, other])
    assert not equal([weight, bias], [weight, bias], [weight, -bias])
    assert not equal([weight, bias], [weight, bias], [weight, None])


class Rounded(torch.autograd.Function):
    """Straight through, as quantised models round."""

    @staticmethod
    def forward(ctx, h):
        return h.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


class FirstAlone(torch.autograd.Function):
    """A sum that hands no gradient to what is added."""

    @staticmethod
    def forward(ctx, h, added):
        return h + added

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_a_function_in_python_to_which_nothing_comes_is_asked_with_zeros(caplog):
    """As autograd does: it is no hook that makes the difference, and nothing goes row by row."""
    caplog.set_level("INFO", "irw_optim")
    model = nn.ModuleDict({"read": nn.Linear(4, 4), "added": nn.Linear(4, 4)}).double()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=ALPHA, model=model)
    twin = copy.deepcopy(model)

    def losses_of(model, x):
        return FirstAlone.apply(model["read"](x), Rounded.apply(model["added"](x))).square().sum(1)

    for _ in range(STEPS):
        x = torch.randn(B, 4).double()
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, x))
        agree(optimizer, model, reference.step(losses_of(twin, x), twin.parameters(), ALPHA), 1e-9)
        assert torch.equal(model["added"].weight.grad, torch.zeros(4, 4).double())
    assert "hook" not in caplog.text
    assert "one backward pass a sample" not in caplog.text
