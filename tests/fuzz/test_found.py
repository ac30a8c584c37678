"""What random cases found, each in its smallest form."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from agreement import agree
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.gradients.autodiff import AutodiffGradients


def wrapped(model: nn.Module, criterion: nn.Module | None = None, **options) -> IRWOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"alpha": 0.5, "model": model, "criterion": criterion, **options}
    return IRWOptimizer(sgd, **options)


IGNORED = torch.tensor([0, 1, -100, -100, -100, -100])


@pytest.mark.parametrize("center", [0.0, 0.5])
@pytest.mark.parametrize("outliers", [None, lambda gram: torch.zeros(len(gram), dtype=torch.bool)])
def test_ignored_samples_are_no_part_of_the_batch(center, outliers):
    """They counted in alpha * B and in the mean that ``center`` subtracts."""
    x, weights = torch.randn(6, 4), []
    for kept in (slice(0, 6), slice(0, 2)):
        torch.manual_seed(1)
        model, criterion = nn.Linear(4, 2), nn.CrossEntropyLoss()
        optimizer = wrapped(model, criterion, center=center, outliers=outliers)
        criterion(model(x[kept]), IGNORED[kept]).backward()
        assert int(optimizer.last_step.worst_off.sum()) == 1  # of two samples
        weights.append(optimizer.last_step.weights[:2])
    torch.testing.assert_close(*weights)


def test_ignored_samples_are_no_crowd_that_others_are_outliers_of():
    """Their gradients are zero; a filter that removed all the others left weights of NaN."""
    model, criterion = nn.Linear(4, 2), nn.CrossEntropyLoss()
    optimizer = wrapped(model, criterion, mix=0.5, outliers=DBSCANFilter(eps=1e-3, min_samples=3))
    criterion(model(torch.randn(6, 4)), IGNORED).backward()
    assert float(optimizer.last_step.weights[:2].sum()) == pytest.approx(1)
    assert not optimizer.last_step.outliers.any()
    assert model.weight.grad.isfinite().all()


def test_a_sample_without_gradient_in_a_model_that_mixes_samples():
    """The check divides by the length of a gradient, and that of an ignored sample is zero."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.first(x)
            return self.second(h - h.mean(0))

    model, criterion = Mixing(), nn.CrossEntropyLoss()
    optimizer = wrapped(model, criterion)
    criterion(model(torch.randn(6, 4)), IGNORED).backward()
    assert optimizer.last_step is not None


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_an_empty_batch_of_sequences(engine):
    """The double backward of an embedding fails on nothing."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    optimizer = wrapped(model, engine=engine)
    optimizer.backward(model(torch.zeros(0, 3, dtype=torch.long)).sum((1, 2)))
    assert optimizer.last_step.weights.shape == (0,)
    optimizer.step()


def test_a_sum_with_a_parameter_may_be_changed_in_place():
    """Plain autograd keeps nothing of a sum."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return (x + self.shift).relu_()

    model = Shifted()
    wrapped(model, engine="ghost").backward(model(torch.randn(6, 4)).sum(1))
    assert model.shift.grad is not None


def test_samples_that_mix_are_found_after_batches_of_one():
    """Alone, a sample is its own mean: what was proven there says nothing of two."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return self.head(h - h.mean(0))

    model = Centred().double()
    optimizer = wrapped(model, alpha=0.4)
    for size in (1, 1, 5):
        x, y = torch.randn(size, 4).double(), torch.randint(3, (size,))
        twin = copy.deepcopy(model)
        losses = F.cross_entropy(twin(x), y, reduction="none")
        truth = reference.step(losses, twin.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        agree(optimizer, model, truth)


def test_an_empty_batch_of_a_batchmean():
    """Its normaliser is the batch's length, a number of Python, which may not divide by 0."""
    model, criterion = nn.Linear(4, 3), nn.KLDivLoss(reduction="batchmean")
    optimizer = wrapped(model, criterion)
    loss = criterion(model(torch.zeros(0, 4)).log_softmax(1), torch.zeros(0, 3))
    assert loss.isnan()  # as torch has it
    loss.backward()
    assert optimizer.last_step.weights.shape == (0,)
    assert not model.weight.grad.any()


@pytest.mark.parametrize("whole_first", [True, False])
@pytest.mark.parametrize(
    "options", [{"weighting": "uniform"}, {"mix": 0.5}, {"center": 1.0}], ids=str
)
def test_ignored_samples_of_one_pass_and_none_of_another(options, whole_first):
    """A pass that ignores nobody counts nothing, and the counts of the others went with it."""
    torch.manual_seed(2)
    x = torch.randn(6, 4).double()
    passes = [torch.tensor([0, 1, 1]), torch.tensor([1, -100, -100])]
    target = torch.cat(passes if whole_first else passes[::-1])
    valid = target != -100
    model, criterion = nn.Linear(4, 2).double(), nn.CrossEntropyLoss()

    def step_on(chosen: Tensor, **accumulation) -> tuple[Tensor, Tensor, Tensor]:
        twin = copy.deepcopy(model)
        optimizer = wrapped(twin, criterion, **options, **accumulation)
        for part, y in zip(x.split(3), target.split(3), strict=True):
            if accumulation:
                (criterion(twin(part), y) / 2).backward()
        if not accumulation:
            criterion(twin(x[chosen]), target[chosen]).backward()
        record = optimizer.last_step
        return record.weights, record.worst_off, twin.weight.grad

    weights, worst_off, gradient = step_on(valid, accumulation_steps=2)
    true_weights, true_worst_off, true_gradient = step_on(valid)
    assert not weights[~valid].any()
    torch.testing.assert_close(weights[valid], true_weights)
    assert torch.equal(worst_off[valid], true_worst_off)
    torch.testing.assert_close(gradient, true_gradient)


class Sub(torch.autograd.Function):
    """A user's function by the name of one of torch's, which mixes the samples."""

    @staticmethod
    def forward(ctx, h):
        return h - 0.5 * h.mean(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - 0.5 * gradient.mean(0)


def centred(h: Tensor) -> Tensor:
    """Samples meet in the backward pass alone."""
    h = h * 1.0
    h.register_hook(lambda gradient: gradient - 0.5 * gradient.mean(0))
    return h


def reversed_(h: Tensor) -> Tensor:
    """As domain adaptation does, once it begins."""
    h = h * 1.0
    h.register_hook(lambda gradient: -0.5 * gradient)
    return h


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("change", [Sub.apply, centred, reversed_], ids=lambda f: f.__qualname__)
def test_what_begins_later_and_is_not_in_the_graph(change, engine):
    """A function's name is its author's, and a hook has no node at all."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = wrapped(model, alpha=0.4, engine=engine)
    for step in range(5):
        x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))

        def losses(step=step, x=x, y=y):
            h = model[0](x)
            return F.cross_entropy(model[1](change(h) if step > 1 else h - 0), y, reduction="none")

        truth = reference.step(losses(), model.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(losses())
        agree(optimizer, model, truth)


def test_a_layer_that_is_parametrized_after_the_optimizer_was_made():
    """Its class is another one then, of which the hook knew no rule."""
    model, criterion = nn.Sequential(nn.Linear(4, 3)).double(), nn.CrossEntropyLoss()
    optimizer = wrapped(model, criterion)
    nn.utils.parametrizations.weight_norm(model[0])
    optimizer.add_param_group({"params": list(model[0].parametrizations.parameters())})
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    truth = reference.step(F.cross_entropy(model(x), y, reduction="none"), model.parameters(), 0.5)
    criterion(model(x), y).backward()
    agree(optimizer, model, truth)


def deviation(h: Tensor) -> Tensor:
    """Statistics pooling, over features that are dead."""
    return torch.cat([h.std(1, keepdim=True), torch.std_mean(0 * h, 1, keepdim=True)[0]], 1)


@pytest.mark.parametrize(
    "pool", [deviation, lambda h: h.norm(3, 1, keepdim=True), lambda h: (0 * h) ** (0 * h)]
)
def test_a_gradient_that_has_no_derivative(pool):
    """At 0 these have a gradient, and autograd's derivative of it is NaN, as were the scores."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LazyLinear(3)).double()
    optimizer = None
    for _ in range(3):
        x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))

        def losses(x=x, y=y):
            h = model[1](model[0](x)) * (torch.arange(6) > 1)[:, None]
            return F.cross_entropy(model[2](pool(h)), y, reduction="none")

        losses()  # makes the lazy layer
        optimizer = optimizer or wrapped(model, alpha=0.4)
        truth = reference.step(losses(), model.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(losses())
        agree(optimizer, model, truth)


def test_a_tensor_of_nothing_that_is_joined():
    """One of shape (0,), as lists of outputs begin, has not the dimension that is joined along."""
    model = nn.Linear(4, 3).double()
    optimizer = wrapped(model, alpha=0.4)
    for size in (1, 6):
        x, y = torch.randn(size, 4).double(), torch.randint(3, (size,))

        def losses(x=x, y=y):
            out = torch.cat([model.weight.flatten()[:0], model(x).T.contiguous()], 1)
            return F.cross_entropy(out.T, y, reduction="none")

        truth = reference.step(losses(), model.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(losses())
        agree(optimizer, model, truth)


def test_an_index_of_nothing():
    """It has a row for each sample, as what takes every row, but no last number."""
    model = nn.Linear(4, 3).double()
    optimizer = wrapped(model, alpha=0.4)
    for size in (6, 1, 6):
        out = model(torch.randn(size, 4).double())
        nothing = torch.zeros(size, 0, dtype=torch.int64)
        losses = out.square().sum(1) + out[nothing].sum((1, 2))
        truth = reference.step(losses, model.parameters(), 0.4)
        optimizer.zero_grad()
        optimizer.backward(losses)
        agree(optimizer, model, truth)


def test_gradients_whose_squares_float64_does_not_hold():
    """Python's power of a float raises there."""
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    wrapped(model).backward(1e160 * model(x).square().sum(1))
    assert model.weight.grad.isfinite().all()


def test_a_change_that_float16_does_not_hold():
    """g_S is as long as it likes: so were its changes in autocast, and BatchNorm took rows."""
    x, w = torch.rand(6, 4), torch.zeros(4, requires_grad=True)
    losses = (x.half() * w.half()).float().sum(1)
    change = AutodiffGradients(losses, [w]).dot({w: torch.full((4,), 1e6)})
    torch.testing.assert_close(change, x.half().float().sum(1) * 1e6, rtol=1e-2, atol=0.0)


def test_a_batch_of_one_says_nothing_of_others(caplog):
    """Around this function layers have quick products, as soon as there are several samples."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h / 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient / 2

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    optimizer = wrapped(model, alpha=0.4)
    for size in (1, 6, 1, 6):
        optimizer.zero_grad()
        losses = model[1](Halved.apply(model[0](torch.randn(size, 4).double()))).square().sum(1)
        truth = reference.step(losses, model.parameters(), 0.4)
        optimizer.backward(losses)
        agree(optimizer, model, truth)
    assert "one backward pass" not in caplog.text
