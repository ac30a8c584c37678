"""Nothing is kept that should go, and nothing is broken that should work afterwards."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.model_check import peak_bytes

ALPHA, B = 0.3, 8


@pytest.fixture(autouse=True, scope="module")
def _look_at_new_objects_only():
    """What other modules hold is neither searched nor counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Body(nn.Module):
    """Ghost layers and, with BatchNorm, autodiff ones; watches an activation."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6) if norm else nn.LayerNorm(6)
        self.watched = weakref.ref(self)
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        if self.broken:
            raise ZeroDivisionError("in forward")
        self.watched = weakref.ref(h)
        return self.second(h)

    def __getstate__(self):
        return {**self.__dict__, "watched": None}


def batch(size: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4), torch.randint(3, (size,))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def attached(model: nn.Module, **options):
    criterion = nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"alpha": ALPHA, "model": model, "criterion": criterion, **options}
    return IRWOptimizer(sgd, **options), criterion


def truth_of(model: Body, x: Tensor, y: Tensor) -> reference.Step:
    twin = Body(isinstance(model.norm, nn.BatchNorm1d))
    twin.load_state_dict(model.state_dict())
    return reference.step(losses_of(twin, x, y), twin.parameters(), ALPHA)


def live_objects() -> tuple[int, int]:
    """How many tensors there are, and how many other objects that can hold something."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in objects)
    return tensors, len(objects) - tensors


def train(optimizer: IRWOptimizer, criterion: nn.Module, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


WAYS = {
    "ghost": {},
    "autodiff": {"engine": "autodiff"},
    "outliers": {"outliers": DBSCANFilter()},
    "cvar": {"weighting": "cvar"},
    "warm-up": {"warmup_steps": 10**6},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("norm", [False, True], ids=["LayerNorm", "BatchNorm"])
class TestMemory:
    def test_flat_over_200_steps(self, options, norm):
        model = Body(norm)
        optimizer, criterion = attached(model, **options)
        train(optimizer, criterion, model, 20)
        tensors, others = live_objects()
        train(optimizer, criterion, model, 200)
        tensors_after, others_after = live_objects()
        assert tensors_after == tensors
        assert others_after < others + 50  # not one object for every fourth step

    def test_no_graph_is_kept_between_steps(self, options, norm):
        """Without the garbage collector: no cycles that wait for it either."""
        model = Body(norm)
        optimizer, criterion = attached(model, **options)
        train(optimizer, criterion, model, 3)
        gc.collect()
        gc.disable()
        try:
            train(optimizer, criterion, model, 1)
            assert model.watched() is None
        finally:
            gc.enable()

    def test_a_forward_that_is_thrown_away_leaves_nothing(self, options, norm):
        model = Body(norm)
        _, criterion = attached(model, **options)
        x, y = batch()
        gc.collect()
        gc.disable()
        try:
            loss = criterion(model(x), y)
            assert model.watched() is not None
            del loss
            assert model.watched() is None
        finally:
            gc.enable()

    def test_a_loss_that_is_kept_keeps_no_activation_after_backward(self, options, norm):
        model = Body(norm)
        _, criterion = attached(model, **options)
        kept = []
        for _ in range(3):
            x, y = batch()
            kept.append(criterion(model(x), y))
            kept[-1].backward()
            gc.collect()
            assert model.watched() is None
        assert len(kept) == 3


class TestDetach:
    def test_the_optimizer_keeps_neither_model_nor_batch(self):
        model = Body(norm=True)
        optimizer, criterion = attached(model)
        x, y = batch()
        criterion(model(x), y).backward()
        optimizer.detach()
        references = [weakref.ref(o) for o in (model, criterion, x)]
        del model, criterion, x
        gc.collect()
        assert [ref() for ref in references] == [None] * 3

    def test_no_hook_is_left(self):
        model = Body(norm=True)
        optimizer, criterion = attached(model)
        train(optimizer, criterion, model, 2)
        optimizer.detach()
        for module in (*model.modules(), criterion):
            assert not [k for k, v in vars(module).items() if "hooks" in k and v]
        assert "forward" not in vars(criterion)

    def test_the_attached_criterion_does_not_keep_a_forgotten_optimizer(self):
        model = Body(norm=False)
        optimizer, criterion = attached(model)
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None
        x, y = batch()
        assert torch.equal(criterion(model(x), y), nn.CrossEntropyLoss()(model(x), y))

    def test_detach_between_forward_and_backward(self):
        model = Body(norm=False)
        optimizer, criterion = attached(model)
        x, y = batch()
        truth = truth_of(model, x, y)
        loss = criterion(model(x), y)
        optimizer.detach()
        loss.backward()
        agree(optimizer, model, truth, 1e-4)


class TestExceptions:
    @pytest.fixture(params=[False, True], ids=["LayerNorm", "BatchNorm"])
    def model(self, request):
        return Body(request.param)

    def still_works(self, model, optimizer, criterion):
        x, y = batch()
        truth = truth_of(model, x, y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        agree(optimizer, model, truth, 1e-4)
        optimizer.step()
        optimizer.detach()
        for module in (*model.modules(), criterion):
            assert not [k for k, v in vars(module).items() if "hooks" in k and v]

    def test_in_forward(self, model):
        optimizer, criterion = attached(model)
        model.broken = True
        with pytest.raises(ZeroDivisionError):
            model(batch()[0])
        model.broken = False
        self.still_works(model, optimizer, criterion)

    def test_in_the_forward_of_a_module_with_parameters_of_its_own(self):
        class Scaled(Body):
            def __init__(self):
                super().__init__(norm=False)
                self.scale = nn.Parameter(torch.ones(3))

            def forward(self, x):
                return super().forward(x) * self.scale

        model, modes = Scaled(), torch.overrides._get_current_function_mode_stack()
        optimizer, criterion = attached(model)
        model.broken = True
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(batch()[0])
        model.broken = False
        assert torch.equal(torch.add(torch.ones(2), 1), torch.full((2,), 2.0))
        assert torch.overrides._get_current_function_mode_stack() == modes
        train(optimizer, criterion, model, 2)

    def test_in_the_criterion(self, model):
        optimizer, criterion = attached(model)
        x, y = batch()
        with pytest.raises((ValueError, RuntimeError)):
            criterion(model(x), y[:3])
        assert criterion.reduction == "mean"
        self.still_works(model, optimizer, criterion)

    @pytest.mark.parametrize("where", ["rule", "filter", "graph"])
    def test_in_backward(self, model, where):
        fail = True

        def maybe(result):
            if fail:
                raise ZeroDivisionError("in backward")
            return result

        def rule(losses, gradients, worst_off):
            return maybe(gradients.dot(gradients.combine(worst_off.float())))

        options = {
            "rule": {"weighting": rule},
            "filter": {"outliers": lambda gram: maybe(torch.zeros(len(gram), dtype=torch.bool))},
            "graph": {},
        }[where]
        optimizer, criterion = attached(model, **options)
        x, y = batch()
        out = model(x)
        if where == "graph":
            out.register_hook(maybe)
        loss = criterion(out, y)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        assert all(p.grad is None for p in model.parameters())
        fail = False
        del out, loss
        self.still_works(model, optimizer, criterion)

    def test_in_backward_leaves_no_activation(self, model):
        def rule(losses, gradients, worst_off):
            raise ZeroDivisionError

        _, criterion = attached(model, weighting=rule)
        x, y = batch()
        with pytest.raises(ZeroDivisionError):
            criterion(model(x), y).backward()
        gc.collect()
        assert model.watched() is None


class TestCopies:
    @pytest.mark.parametrize("norm", [False, True], ids=["LayerNorm", "BatchNorm"])
    @pytest.mark.parametrize("trained", [False, True])
    def test_deepcopy_of_an_attached_model_is_a_plain_model(self, norm, trained):
        model = Body(norm)
        optimizer, criterion = attached(model)
        if trained:
            train(optimizer, criterion, model, 2)
        twin = copy.deepcopy(model)
        x, y = batch()
        truth = truth_of(model, x, y)
        plain = nn.CrossEntropyLoss()
        plain(twin(x), y).backward()
        assert all(p.grad is not None for p in twin.parameters())
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        agree(optimizer, model, truth, 1e-4)

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    def test_pickle_of_an_attached_model(self, how):
        model = Body(norm=True)
        optimizer, criterion = attached(model)
        train(optimizer, criterion, model, 2)
        twin = through(how, model)
        for ours, its in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, its)
        x, y = batch()
        nn.CrossEntropyLoss()(twin(x), y).backward()
        twin_optimizer, twin_criterion = attached(twin)
        truth = truth_of(twin, x, y)
        twin_optimizer.zero_grad()
        twin_criterion(twin(x), y).backward()
        agree(twin_optimizer, twin, truth, 1e-4)
        train(optimizer, criterion, model, 1)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_of_all_three_trains_by_itself(self, how):
        model = Body(norm=True)
        optimizer, criterion = attached(model)
        train(optimizer, criterion, model, 2)
        copies = through(how, (model, criterion, optimizer))
        other, its_criterion, its_optimizer = copies
        before = [p.detach().clone() for p in model.parameters()]
        x, y = batch()
        truth = truth_of(other, x, y)
        its_optimizer.zero_grad()
        its_criterion(other(x), y).backward()
        agree(its_optimizer, other, truth, 1e-4)
        its_optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))
        train(optimizer, criterion, model, 1)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_a_copy_of_the_criterion_is_a_plain_one(self, how):
        model = Body(norm=False)
        optimizer, criterion = attached(model)
        plain = through(how, criterion)
        x, y = batch()
        assert torch.equal(plain(model(x), y), F.cross_entropy(model(x), y))
        assert optimizer.last_step is None


def through(how: str, value):
    if how == "deepcopy":
        return copy.deepcopy(value)
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_step_of_a_small_model_holds_hardly_more_than_a_plain_one():
    x, y = torch.randn(64, 100), torch.randint(0, 2, (64,))

    def held(wrapped):
        layers = [nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)]
        model, criterion = nn.Sequential(*layers), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrapped:
            optimizer = IRWOptimizer(optimizer, alpha=0.2, model=model, criterion=criterion)

        def step():
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

        for _ in range(9):  # past the comparisons with autograd at uses 1, 2, 4, 8
            step()
        return x.nbytes + sum(p.nbytes for p in model.parameters()) + peak_bytes(step)

    assert held(wrapped=True) <= 1.25 * held(wrapped=False)
