"""What is in ``p.grad`` when a step is asked for, and what the optimizer says to it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from inner_optimizers import SGD, Run
from torch import nn
from torch.nn.functional import cross_entropy

from irw_optim import IRWOptimizer


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_without_any_gradient_is_refused(closure: bool) -> None:
    run = Run(SGD)
    before = [p.detach().clone() for p in run.parameters]
    with pytest.raises(RuntimeError, match=r"step\(\) found no gradient: expected .*backward"):
        run.optimizer.step((lambda: torch.ones(())) if closure else None)
    assert all(map(torch.equal, run.parameters, before))


def test_a_closure_may_skip_its_batch() -> None:
    """As Lightning's does where training_step returns None."""
    run = Run(SGD).train(SGD.batches(1))
    before = [p.detach().clone() for p in run.parameters]
    run.optimizer.zero_grad()
    assert run.optimizer.step(lambda: None) is None
    assert all(map(torch.equal, run.parameters, before))
    assert run.optimizer.steps == 1


def test_a_closure_may_skip_backward_once_steps_were_taken() -> None:
    """As Lightning's does in the epoch that moves the averages of BatchNorm."""
    run = Run(SGD).train(SGD.batches(1))
    before = [p.detach().clone() for p in run.parameters]
    run.optimizer.zero_grad()
    assert run.optimizer.step(lambda: torch.ones(())) == 1
    assert all(map(torch.equal, run.parameters, before))
    assert run.optimizer.steps == 1


def test_gradients_of_zero_are_the_inner_optimizers() -> None:
    """Nothing to weigh: no step is counted, and the inner optimizer does what it does."""
    run = Run(SGD)
    for p in run.parameters:
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    assert run.optimizer.steps == 0
    assert run.optimizer.state, "which here is to make its momentum buffers"


@pytest.mark.parametrize("closure", [False, True])
def test_a_gradient_that_was_not_weighted_is_refused(closure: bool) -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]

    def evaluate() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = cross_entropy(run.model(x), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in run.parameters]
    if not closure:
        evaluate()
    with pytest.raises(RuntimeError, match=r"a gradient without weights: expected .*inner\.step"):
        run.optimizer.step(evaluate if closure else None)
    assert all(map(torch.equal, run.parameters, before))
    run.optimizer.inner.step()
    assert not all(map(torch.equal, run.parameters, before))


def test_a_criterion_called_in_eval_mode_is_not_weighted() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    run.model.eval()
    run.criterion(run.model(x), y).backward()
    with pytest.raises(RuntimeError, match="train mode"):
        run.optimizer.step()


def written_back(run: Run, change: Any, clear: Any) -> list[torch.Tensor]:
    """Two weighted gradients are taken aside, and something made of them is put in their place."""
    taken = []
    for x, y in SGD.batches(2):
        run.criterion(run.model(x), y).backward()
        taken.append([p.grad.clone() for p in run.parameters])
        clear()
    made = [change(first, second) for first, second in zip(*taken, strict=True)]
    for p, gradient in zip(run.parameters, made, strict=True):
        p.grad = gradient
    return made


def away_from_conflict(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first - min(0.0, float((first * second).sum())) / second.square().sum() * second


@pytest.mark.parametrize("by", ["optimizer", "model", "inner", "hand"])
def test_gradients_written_back_are_stepped_on(by: str) -> None:
    """Gradient surgery, adversarial debiasing: the step is that of the gradient at hand."""
    run = Run(SGD)
    clear = {
        "optimizer": run.optimizer.zero_grad,
        "model": run.model.zero_grad,
        "inner": run.optimizer.inner.zero_grad,
        "hand": lambda: [setattr(p, "grad", None) for p in run.parameters],
    }[by]
    plain = Run(SGD)
    for number in range(2):
        for p, g in zip(
            plain.parameters, written_back(run, away_from_conflict, clear), strict=True
        ):
            p.grad = g.clone()
        run.optimizer.step()
        plain.optimizer.inner.step()
        assert all(map(torch.equal, run.parameters, plain.parameters))
        assert run.optimizer.steps == number + 1


def test_only_a_weighted_pass_since_the_last_step_allows_it() -> None:
    run = Run(SGD).train(SGD.batches(2))
    x, y = SGD.batches(1)[0]
    before = [p.detach().clone() for p in run.parameters]
    run.optimizer.zero_grad()
    cross_entropy(run.model(x), y).backward()
    with pytest.raises(RuntimeError, match="a gradient without weights"):
        run.optimizer.step()
    assert all(map(torch.equal, run.parameters, before))
    assert run.optimizer.steps == 2


def test_a_batch_that_was_cleared_is_no_step() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    run.criterion(run.model(x), y).backward()
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient"):
        run.optimizer.step()
    run.criterion(run.model(x), y).backward()
    run.optimizer.zero_grad(set_to_none=False)
    run.optimizer.step()
    assert run.optimizer.steps == 0


def test_what_is_written_back_has_to_be_finite() -> None:
    run = Run(SGD)
    before = [p.detach().clone() for p in run.parameters]
    written_back(run, lambda first, second: first / 0, run.optimizer.zero_grad)
    with pytest.raises(FloatingPointError, match=r"written back to 4 parameters.*\(6, 5\)"):
        run.optimizer.step()
    assert all(map(torch.equal, run.parameters, before))


def test_a_batch_thrown_away_does_not_taint_what_is_written_back() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    run.criterion(run.model(x.index_fill(0, torch.tensor(0), float("nan"))), y).backward()
    run.optimizer.zero_grad()
    written_back(run, torch.add, run.optimizer.zero_grad)
    run.optimizer.step()
    assert run.optimizer.steps == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("closure", [False, True])
def test_a_loss_that_is_not_finite_raises_before_anything_changes(
    value: float, closure: bool
) -> None:
    run = Run(SGD).train(SGD.batches(2))
    x, y = SGD.batches(3)[2]
    before = [p.detach().clone() for p in run.parameters]
    state = {k: v.clone() for k, v in run.optimizer.state[run.parameters[0]].items()}
    x[3], x[7] = value, value
    with pytest.raises(FloatingPointError, match=r"2 samples .*indices 3, 7"):
        run.optimizer.step(lambda: run.evaluate(x, y)) if closure else run.step(x, y)
    assert all(map(torch.equal, run.parameters, before))
    for key, tensor in state.items():
        assert torch.equal(run.optimizer.state[run.parameters[0]][key], tensor)
    assert run.optimizer.steps == 2
    run.train(SGD.batches(1))
    assert run.optimizer.steps == 3


def test_an_infinite_loss_with_a_finite_gradient_raises_too() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    losses = cross_entropy(run.model(x), y, reduction="none")
    shift = torch.zeros_like(losses)
    shift[4] = float("inf")
    run.optimizer.backward(losses + shift)
    with pytest.raises(FloatingPointError, match="indices 4"):
        run.optimizer.step()


@pytest.mark.parametrize("kept", [False, True])
def test_a_batch_thrown_away_by_the_model_is_forgotten(kept: bool) -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    run.criterion(run.model(x.index_fill(0, torch.tensor(0), float("nan"))), y).backward()
    run.model.zero_grad(set_to_none=not kept)
    run.criterion(run.model(x), y).backward()
    run.optimizer.step()
    assert run.optimizer.steps == 1


def test_an_accumulated_batch_is_not_forgotten() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    run.criterion(run.model(x), y).backward()
    run.criterion(run.model(x.index_fill(0, torch.tensor(0), float("nan"))), y).backward()
    run.criterion(run.model(x), y).backward()
    with pytest.raises(FloatingPointError, match="indices 0"):
        run.optimizer.step()


def test_accumulated_batches_each_add_their_weighted_gradient() -> None:
    run, single = Run(SGD), Run(SGD)
    total = [torch.zeros_like(p) for p in run.parameters]
    for x, y in SGD.batches(3):
        (run.criterion(run.model(x), y) / 3).backward()
        single.evaluate(x, y)
        for t, p in zip(total, single.parameters, strict=True):
            t += p.grad / 3
    for t, p in zip(total, run.parameters, strict=True):
        torch.testing.assert_close(p.grad, t, rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_refused_by_name() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    loss = run.criterion(run.model(x), y)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*AdaHessian"):
        loss.backward(create_graph=True)


def test_detach_leaves_no_trace() -> None:
    model, criterion = SGD.model(), nn.CrossEntropyLoss()
    run = Run(SGD, model)
    x, y = SGD.batches(1)[0]
    watched = [weakref.ref(run.optimizer), weakref.ref(model), weakref.ref(run.criterion)]
    state, keys = {k: v.clone() for k, v in model.state_dict().items()}, set(vars(criterion))
    run.step(x, y)
    run.optimizer.detach()
    assert set(vars(run.criterion)) == keys
    assert model.state_dict().keys() == state.keys()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    inner = run.optimizer.inner
    del run, model
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
    assert inner.param_groups


def test_after_detach_the_loop_is_a_plain_one() -> None:
    run = Run(SGD)
    run.optimizer.detach()
    run.optimizer.detach()
    x, y = SGD.batches(1)[0]
    run.criterion(run.model(x), y).backward()
    plain = SGD.model()
    cross_entropy(plain(x), y).backward()
    for p, q in zip(run.parameters, plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    again = IRWOptimizer(run.optimizer.inner, alpha=0.3, model=run.model, criterion=run.criterion)
    again.zero_grad()
    run.criterion(run.model(x), y).backward()
    again.step()


class Proxy:
    """Lightning's and Fabric's way of wrapping: a class made on the fly from both classes."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("P" + type(optimizer).__name__, (Proxy, type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def test_proxies_that_imitate_the_class() -> None:
    run, twin = Run(SGD), Run(SGD)
    optimizer, run.optimizer = run.optimizer, Proxy(run.optimizer)  # type: ignore[assignment]
    assert isinstance(run.optimizer, IRWOptimizer)
    run.train(SGD.batches())
    twin.train(SGD.batches())
    assert all(map(torch.equal, run.parameters, twin.parameters))
    assert run.optimizer.steps == optimizer.steps == 4
    assert run.optimizer.last_step is optimizer.last_step is not None
    x, y = SGD.batches(1)[0]
    run.optimizer.zero_grad()
    run.optimizer.backward(cross_entropy(run.model(x), y, reduction="none"))
    assert run.optimizer.last_step is optimizer.last_step
    run.optimizer.step()
    assert run.optimizer.steps == 5
    state = run.optimizer.state_dict()
    assert state["irw"]["steps"] == 5
    run.optimizer.load_state_dict({**state, "irw": {**state["irw"], "steps": 7}})
    assert optimizer.steps == 7


def test_the_profiler_sees_one_step_and_one_zero_grad() -> None:
    run = Run(SGD)
    x, y = SGD.batches(1)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run.step(x, y)
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.")]
    assert names.count("Optimizer.step#SGD.step") == 1
    assert names.count("Optimizer.zero_grad#SGD.zero_grad") == 1
    assert len(names) == 2


def test_the_hooks_of_a_step_are_called_from_outside_to_inside_and_back() -> None:
    run, order = Run(SGD), []
    for name, optimizer in (("ours", run.optimizer), ("inner", run.optimizer.inner)):
        optimizer.register_step_pre_hook(lambda *_, name=name: order.append(f"{name} before"))
        optimizer.register_step_post_hook(lambda *_, name=name: order.append(f"{name} after"))
    run.step(*SGD.batches(1)[0])
    assert order == ["ours before", "inner before", "inner after", "ours after"]


def test_a_hook_may_change_the_arguments_of_a_step() -> None:
    run, calls = Run(SGD), []
    x, y = SGD.batches(1)[0]

    def closure() -> torch.Tensor:
        calls.append(1)
        return run.evaluate(x, y)

    run.optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert run.optimizer.step() is not None
    assert calls == [1]


def test_methods_of_the_inner_optimizer_are_at_hand() -> None:
    class Eager(torch.optim.SGD):
        mode = "eval"

        def train(self) -> None:
            self.mode = "train"

    optimizer = IRWOptimizer(Eager([nn.Parameter(torch.zeros(2))], lr=0.1), alpha=0.3)
    assert not hasattr(optimizer, "eval")
    optimizer.train()
    assert optimizer.mode == optimizer.inner.mode == "train"


def test_copies_have_neither_hooks_nor_a_schedulers_patch() -> None:
    """As with torch's own optimizers, whose copies begin without either."""
    run, calls = Run(SGD), []
    torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    run.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(run.optimizer)
    assert "step" in vars(run.optimizer)
    assert "step" not in vars(twin)
    assert not twin._optimizer_step_post_hooks
