"""Optimizers with steps of their own: checked and counted as `step` is, whoever takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from inner_optimizers import ALPHA, SGD, Run, pytorch_optimizer
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy

from irw_optim import IRWMonitor, IRWOptimizer

RHO = 0.05


class Sharp(optim.Optimizer):
    """Sharpness-aware minimization as most have it, around an optimizer of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {})
        self.base = optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        self.moved = {}
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.moved[p] = p.detach().clone()
                p.add_(p.grad, alpha=RHO)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p, before in self.moved.items():
            p.copy_(before)
        self.base.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> None:
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class SharpByItself(optim.SGD):
    """Steps itself in the second."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)

    first_step = Sharp.first_step

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p, before in self.moved.items():
            p.copy_(before)
        self.step()
        if zero_grad:
            self.zero_grad()


class ThreeSteps(optim.Optimizer):
    """Lets no other optimizer step: the third changes the parameters by itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {})

    def first_step(self) -> None:
        self.zero_grad()

    def second_step(self) -> None:
        pass

    @torch.no_grad()
    def third_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)


def sam(parameters: Any) -> Any:
    return pytorch_optimizer.SAM(list(parameters), optim.SGD, rho=RHO, lr=0.1)


OURS = {"around another": Sharp, "by itself": SharpByItself}
SHARP = {**OURS, "SAM": sam} if pytorch_optimizer is not None else OURS


class Training:
    def __init__(self, make: Callable[[Any], Any], **options: Any) -> None:
        self.model, self.criterion = SGD.model(), nn.CrossEntropyLoss()
        options = {"alpha": ALPHA, "model": self.model, "criterion": self.criterion, **options}
        self.optimizer = IRWOptimizer(make(self.model.parameters()), **options)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def backward(self, x: Tensor, y: Tensor) -> None:
        self.criterion(self.model(x), y).backward()

    def step(self, x: Tensor, y: Tensor) -> None:
        self.backward(x, y)
        self.optimizer.first_step(zero_grad=True)
        self.backward(x, y)
        self.optimizer.second_step(zero_grad=True)


def copies(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("make", SHARP.values(), ids=SHARP)
class TestTwoSteps:
    def test_both_passes_are_weighted(self, make):
        training = Training(make)
        twin = SGD.model()
        plain = make(twin.parameters())
        for x, y in SGD.batches():
            training.step(x, y)
            for own_step in (plain.first_step, plain.second_step):
                losses = cross_entropy(twin(x), y, reduction="none")
                truth = reference.step(losses, twin.parameters(), ALPHA)
                for p, g in zip(twin.parameters(), truth.gradients, strict=True):
                    p.grad = g
                own_step(zero_grad=True)
            assert reference.error(training.optimizer.last_step.weights, truth.weights) < 1e-9
        for ours, its in zip(training.parameters, twin.parameters(), strict=True):
            assert reference.error(ours, its) < 1e-9

    def test_two_steps_count_as_one_and_the_warm_up_ends(self, make):
        training = Training(make, warmup_steps=2)
        monitor = IRWMonitor(training.optimizer)
        uniform = []
        for number, (x, y) in enumerate(SGD.batches()):
            assert training.optimizer.steps == number
            training.step(x, y)
            weights = training.optimizer.last_step.weights
            uniform.append(bool(torch.allclose(weights, weights.mean())))
        assert uniform == [True, True, False, False]
        assert [row["step"] for row in monitor.rows()] == [1, 2, 3, 4]

    def test_a_scheduler_knows_of_the_step(self, make):
        training = Training(make)
        scheduler = optim.lr_scheduler.StepLR(training.optimizer, 1)
        training.step(*SGD.batches(1)[0])
        scheduler.step()

    def test_hooks_of_a_step_are_called_once(self, make):
        training, order = Training(make), []
        training.optimizer.register_step_pre_hook(lambda *_: order.append("before"))
        training.optimizer.register_step_post_hook(lambda *_: order.append("after"))
        training.step(*SGD.batches(1)[0])
        assert order == ["before", "after"]

    @pytest.mark.parametrize("broken", ["first", "second"])
    def test_what_is_not_finite_moves_nothing(self, make, broken):
        training = Training(make)
        (x, y), before = SGD.batches(1)[0], copies(training.parameters)
        spoilt = x.index_fill(0, torch.tensor([3]), float("nan"))
        training.backward(spoilt if broken == "first" else x, y)
        if broken == "second":
            training.optimizer.first_step(zero_grad=True)
            training.backward(spoilt, y)
        with pytest.raises(FloatingPointError, match="indices 3"):
            getattr(training.optimizer, f"{broken}_step")()
        assert all(map(torch.equal, training.parameters, before))
        assert training.optimizer.steps == 0
        training.optimizer.zero_grad()
        training.step(x, y)
        assert training.optimizer.steps == 1

    @pytest.mark.parametrize("unweighted", ["first_step", "second_step"])
    def test_a_gradient_that_was_not_weighted_is_refused(self, make, unweighted):
        training = Training(make)
        x, y = SGD.batches(1)[0]
        training.step(x, y)
        before = copies(training.parameters)
        cross_entropy(training.model(x), y).backward()
        if unweighted == "second_step":
            training.optimizer.inner.first_step(zero_grad=True)
            cross_entropy(training.model(x), y).backward()
        with pytest.raises(RuntimeError, match="a gradient without weights"):
            getattr(training.optimizer, unweighted)()
        for ours, its in zip(training.parameters, before, strict=True):
            assert torch.equal(ours, its)

    def test_a_plain_step_on_purpose_is_the_inner_optimizers(self, make):
        training = Training(make)
        x, y = SGD.batches(1)[0]
        for own_step in (training.optimizer.inner.first_step, training.optimizer.inner.second_step):
            cross_entropy(training.model(x), y).backward()
            own_step(zero_grad=True)
        assert training.optimizer.steps == 0


@pytest.mark.parametrize("make", [Sharp, *([sam] if pytorch_optimizer is not None else [])])
@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_step_with_a_closure_moves_nothing_either(make, broken):
    training = Training(make)
    (x, y), before = SGD.batches(1)[0], copies(training.parameters)
    spoilt = x.index_fill(0, torch.tensor([3]), float("nan"))
    training.backward(spoilt if broken == "first" else x, y)
    with pytest.raises(FloatingPointError, match="indices 3"):
        training.optimizer.step(lambda: training.backward(spoilt, y))
    assert all(map(torch.equal, training.parameters, before))
    training.optimizer.zero_grad()
    training.backward(x, y)
    training.optimizer.step(lambda: training.backward(x, y))
    assert training.optimizer.steps == 1


def test_a_third_step_is_the_one_that_counts():
    training = Training(ThreeSteps, warmup_steps=1)
    x, y = SGD.batches(1)[0]
    for number in range(3):
        training.backward(x, y)
        training.optimizer.first_step()
        training.backward(x, y)
        training.optimizer.second_step()
        assert training.optimizer.steps == number
        training.optimizer.third_step()
        training.optimizer.zero_grad()
        assert training.optimizer.steps == number + 1
    training.backward(x.index_fill(0, torch.tensor([1]), float("nan")), y)
    before = copies(training.parameters)
    with pytest.raises(FloatingPointError, match="indices 1"):
        training.optimizer.third_step()
    assert all(map(torch.equal, training.parameters, before))


def test_any_method_that_lets_the_optimizer_step_counts():
    class Twice(optim.SGD):
        def advance(self) -> str:
            self.step()
            self.step()
            return "advanced"

        def describe(self) -> str:
            return "no step"

    run = Run(SGD._replace(make=lambda p: Twice(p, lr=0.1)))
    x, y = SGD.batches(1)[0]
    with pytest.raises(RuntimeError, match="no gradient"):
        run.optimizer.advance()
    run.evaluate(x, y)
    assert run.optimizer.describe() == "no step"
    assert run.optimizer.steps == 0
    assert run.optimizer.advance() == "advanced"
    assert run.optimizer.steps == 1
    assert not run.optimizer.inner._optimizer_step_pre_hooks
