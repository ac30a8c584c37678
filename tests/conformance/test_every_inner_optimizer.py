"""Every inner optimizer of torch, schedule-free and pytorch_optimizer goes through every row."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inner_optimizers import (
    CLASSES,
    CheckedRun,
    Inner,
    PlainRun,
    Run,
    every_inner,
    same,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


@pytest.fixture
def calls() -> Counter[str]:
    return Counter()


@pytest.fixture
def global_hooks(calls: Counter[str]) -> Iterator[None]:
    before = register_optimizer_step_pre_hook(lambda *_: calls.update(["global pre"]))
    after = register_optimizer_step_post_hook(lambda *_: calls.update(["global post"]))
    yield
    before.remove()
    after.remove()


def _through_pickle(objects: Any) -> Any:
    return pickle.loads(pickle.dumps(objects))


@every_inner
class TestEveryInnerOptimizer:
    def test_it_is_an_optimizer(self, inner: Inner) -> None:
        run = Run(inner)
        assert isinstance(run.optimizer, Optimizer)
        assert run.optimizer.param_groups is run.optimizer.inner.param_groups
        assert run.optimizer.state is run.optimizer.inner.state
        assert type(run.optimizer.inner).__name__ in repr(run.optimizer)

    def test_it_steps_on_the_weighted_gradient(self, inner: Inner) -> None:
        """Bit for bit as the inner optimizer does when it is given that gradient."""
        run = CheckedRun(inner).train(inner.batches())
        assert run.error < 1e-9, "against a loop over the samples"
        plain = PlainRun(run).train(inner.batches())
        assert all(map(torch.equal, run.parameters, plain.parameters))
        assert same(run.optimizer.inner.state_dict(), plain.optimizer.state_dict())
        later = Run(inner).train(inner.batches(12))  # some only begin to move after a few steps
        assert not all(map(torch.equal, later.parameters, Run(inner).parameters))

    def test_nothing_of_ours_is_in_its_state(self, inner: Inner) -> None:
        run = Run(inner).train(inner.batches())
        plain = PlainRun(run).train(inner.batches())
        ours, theirs = run.optimizer.inner.state, plain.optimizer.state
        assert len(ours) == len(theirs)
        for p, q in zip(run.parameters, plain.parameters, strict=True):
            assert ours[p].keys() == theirs[q].keys()

    def test_step_returns_what_the_inner_optimizer_returns(self, inner: Inner) -> None:
        run, (x, y) = Run(inner), inner.batches()[0]
        loss = run.evaluate(x, y).item()
        ours = run.optimizer.step(lambda: run.evaluate(x, y))
        plain = PlainRun(run)
        plain.evaluate(x, y)
        theirs = plain.optimizer.step(lambda: plain.evaluate(x, y))
        if theirs is None:
            assert ours is None
        else:
            assert float(ours.detach()) == pytest.approx(float(theirs), rel=1e-12)
            if inner.name != "AdamWScheduleFreeClosure":  # evaluates elsewhere
                assert float(ours.detach()) == pytest.approx(loss, rel=1e-12)

    def test_hooks_of_a_step_fire_once(
        self, inner: Inner, calls: Counter[str], global_hooks: None
    ) -> None:
        run = Run(inner)
        seen: list[object] = []
        run.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o))
        run.optimizer.register_step_post_hook(lambda o, *_: seen.append(o))
        if isinstance(run.optimizer.inner, Optimizer):
            run.optimizer.inner.register_step_pre_hook(lambda *_: calls.update(["inner pre"]))
            run.optimizer.inner.register_step_post_hook(lambda *_: calls.update(["inner post"]))
        x, y = inner.batches()[0]
        run.step(x, y)
        assert seen == [run.optimizer, run.optimizer]
        ours = Counter(calls)
        calls.clear()
        PlainRun(run).step(x, y)
        for when in ("pre", "post"):
            assert ours[f"global {when}"] == calls[f"global {when}"]
            assert ours[f"inner {when}"] == isinstance(run.optimizer.inner, Optimizer)

    def test_hooks_of_state_dicts_fire_once(self, inner: Inner, calls: Counter[str]) -> None:
        run = Run(inner).train(inner.batches(1))
        optimizer = run.optimizer
        optimizer.register_state_dict_pre_hook(lambda _: calls.update(["save pre"]))
        optimizer.register_state_dict_post_hook(lambda _, d: {**d, "mark": 1})
        optimizer.register_load_state_dict_pre_hook(lambda _, d: calls.update([str(d.pop("mark"))]))
        optimizer.register_load_state_dict_post_hook(lambda _: calls.update(["load post"]))
        state = optimizer.state_dict()
        assert state["mark"] == 1
        optimizer.load_state_dict(state)
        assert state["mark"] == 1, "the caller's dict is the caller's"
        assert calls == {"save pre": 1, "1": 1, "load post": 1}

    def test_a_resumed_run_is_the_uninterrupted_one(self, inner: Inner) -> None:
        batches = [(x.float() if x.is_floating_point() else x, y) for x, y in inner.batches(6)]
        first = Run(inner, inner.model().float(), warmup_steps=1).train(batches[:3])
        saved = io.BytesIO()
        torch.save([first.model.state_dict(), first.optimizer.state_dict()], saved)
        saved.seek(0)
        weights, state = torch.load(saved, weights_only=_loads_safely(inner))
        second = Run(inner, inner.model().float(), warmup_steps=1)
        second.model.load_state_dict(weights)
        second.optimizer.load_state_dict(state)
        first.train(batches[3:])
        second.train(batches[3:])
        assert all(map(torch.equal, first.parameters, second.parameters))
        assert same(first.optimizer.state_dict(), second.optimizer.state_dict())
        assert first.optimizer.steps == second.optimizer.steps == 6

    def test_checkpoints_of_wrapper_and_plain_optimizer_interchange(
        self, inner: Inner, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = Run(inner).train(inner.batches())
        state = run.optimizer.state_dict()
        plain = inner.inner(inner.model())
        plain.load_state_dict(state)
        expected = run.optimizer.inner.state_dict()
        assert same(plain.state_dict(), expected)
        assert not caplog.messages

        other = Run(inner)
        other.optimizer.load_state_dict(plain.state_dict())
        assert same(other.optimizer.inner.state_dict(), expected)
        assert any("a plain optimizer's" in message for message in caplog.messages)

    @pytest.mark.parametrize("how", [copy.deepcopy, _through_pickle], ids=["deepcopy", "pickle"])
    def test_copies_made_together_stay_attached_to_each_other(
        self, inner: Inner, how: Callable[[Any], Any]
    ) -> None:
        if not inner.survives(how):
            pytest.skip(f"a copy of a plain {inner} does not step")
        batches = inner.batches(12)
        run = Run(inner).train(batches[:2])
        twin = copy.copy(run)
        twin.model, twin.criterion, twin.optimizer = how((run.model, run.criterion, run.optimizer))
        run.train(batches[2:])
        assert not all(map(torch.equal, run.parameters, twin.parameters))
        twin.train(batches[2:])
        assert all(map(torch.equal, run.parameters, twin.parameters))
        assert twin.optimizer.steps == run.optimizer.steps == len(batches)

    def test_groups_and_state_that_are_assigned_reach_the_inner_optimizer(
        self, inner: Inner
    ) -> None:
        optimizer = Run(inner).train(inner.batches(1)).optimizer
        for name in ("param_groups", "state"):
            new = copy.copy(getattr(optimizer, name))
            try:
                setattr(optimizer.inner, name, new)
            except AttributeError:  # a read-only property there: then here as well
                with pytest.raises(AttributeError):
                    setattr(optimizer, name, new)
            else:
                setattr(optimizer, name, new)
                assert getattr(optimizer.inner, name) is new

    def test_a_group_can_be_added_later(self, inner: Inner) -> None:
        if inner.name in ("SparseAdam", "LBFGS", "SAM"):
            pytest.skip("it takes no further group: by its kind, or by a bug of its own")
        if inner.name == "Adagrad" and not _adagrad_takes_further_groups():
            pytest.skip("a plain Adagrad of this torch fails too: KeyError('sum')")
        model = inner.model().append(nn.Linear(CLASSES, CLASSES, bias=False).double())
        late = model[-1].weight.requires_grad_(False)
        run = Run(inner, model)
        with pytest.raises(ValueError, match=r"not the model's.*shape \(3, 3\)"):
            run.optimizer.add_param_group({"params": iter([nn.Parameter(torch.zeros(3, 3))])})
        assert len(run.optimizer.param_groups) == 1

        late.requires_grad_()
        options = run.optimizer.param_groups[0] if inner.name == "Muon-mixed" else {}
        run.optimizer.add_param_group({**options, "params": iter([late])})
        assert len(run.optimizer.inner.param_groups) == 2
        assert late in run.optimizer.scored_parameters()
        before = late.detach().clone()
        run.train(inner.batches(12))
        assert not torch.equal(late, before)

    def test_gradients_can_be_cleared_anywhere(self, inner: Inner) -> None:
        run, (x, y) = Run(inner), inner.batches()[0]
        for zero_grad in (
            run.optimizer.zero_grad,
            run.model.zero_grad,
            run.optimizer.inner.zero_grad,
        ):
            run.criterion(run.model(x), y).backward()
            assert all(p.grad is not None for p in run.parameters)
            zero_grad()
            assert all(p.grad is None for p in run.parameters)
            run.step(x, y)
        run.model.zero_grad(set_to_none=False)
        assert all(not p.grad.to_dense().any() for p in run.parameters)

    def test_what_happens_to_the_gradient_before_the_step_counts(self, inner: Inner) -> None:
        if "evaluates" in inner.closure:
            pytest.skip("the gradient is made inside the step")
        if inner.sparse:
            pytest.skip("clip_grad_norm_ takes no sparse gradient")
        run = Run(inner)
        for x, y in inner.batches():
            loss = run.evaluate(x, y)
            nn.utils.clip_grad_norm_(run.parameters, 1e-3)
            run.gradients[-1] = [p.grad.clone() for p in run.parameters]
            run.optimizer.step(loss.item if inner.closure else None)
        plain = PlainRun(run).train(inner.batches())
        assert all(map(torch.equal, run.parameters, plain.parameters))


def _adagrad_takes_further_groups() -> bool:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad = second.grad = torch.ones(1)
    plain = torch.optim.Adagrad([first])
    plain.add_param_group({"params": [second]})
    try:
        plain.step()
    except KeyError:
        return False
    return True


def _loads_safely(inner: Inner) -> bool:
    """All but those whose own state is no plain data."""
    state = inner.inner(inner.model()).state_dict()
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    try:
        torch.load(saved, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
