"""Every torch.nn loss and reduction through the whole optimizer: weights and scaled p.grad.

The losses of the loop are literal: one sample alone through the criterion, with mean reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import reference
import torch
from agreement import agree, gradient_errors
from torch import Tensor, nn

from irw_optim import IRWOptimizer, PerSampleLoss

# torch, of every KLDivLoss whose reduction is "mean"
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

ALPHA, B, C, T, WIDTH = 0.4, 6, 3, 4, 5
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 3.0]).double()


class Case(NamedTuple):
    """A criterion by reduction, the shape of the model's output and its further arguments.

    Attributes:
        make: reduction -> criterion.
        shape: of one sample's output.
        arguments: what follows the output in the call; tensors with the batch first.
        of_sample: how the i-th sample's loss is had; by default it is a batch of its own.
        link: what the output is mapped by before it is a valid input.
    """

    make: Callable[[str], nn.Module]
    shape: tuple[int, ...]
    arguments: Callable[[], tuple]
    of_sample: Callable[[nn.Module, Tensor, tuple, int], Tensor] | None = None
    link: Callable[[Tensor], Tensor] = lambda output: output


def alone(criterion: nn.Module, output: Tensor, arguments: tuple, i: int) -> Tensor:
    some = [a[i : i + 1] if isinstance(a, Tensor) and a.ndim else a for a in arguments]
    return criterion(output[i : i + 1], *some)


def weighted_class(criterion: nn.Module, output: Tensor, arguments: tuple, i: int) -> Tensor:
    """A weighted mean over one sample divides its weight out again: it is wanted with it."""
    return nn.CrossEntropyLoss(
        weight=criterion.weight, reduction="sum", label_smoothing=criterion.label_smoothing
    )(output[i : i + 1], arguments[0][i : i + 1])


def sequence_of_ctc(criterion: nn.Module, output: Tensor, arguments: tuple, i: int) -> Tensor:
    targets, input_lengths, target_lengths = arguments
    lengths = input_lengths[i : i + 1], target_lengths[i : i + 1]
    return criterion(output[:, i : i + 1], targets[i : i + 1], *lengths)


def normal(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(B, *shape).double(),)


def positive(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.rand(B, *shape).double() * 0.8 + 0.1,)


def signs(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(2, (B, *shape)).double() * 2 - 1,)


def classes(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(C, (B, *shape)),)


def some_ignored() -> tuple[Tensor]:
    target = torch.randint(C, (B, T))
    target[torch.arange(T) > torch.tensor([[3], [1], [2], [0], [3], [2]])] = -100
    return (target,)


def loss(kind: type[nn.Module], **options) -> Callable[[str], nn.Module]:
    return lambda reduction: kind(reduction=reduction, **options)


def log_softmax(output: Tensor) -> Tensor:
    return output.log_softmax(1)


CASES = {
    "CrossEntropy": Case(loss(nn.CrossEntropyLoss), (C,), classes()),
    "CrossEntropy, sequence": Case(loss(nn.CrossEntropyLoss), (C, T), classes(T)),
    "CrossEntropy, ignore_index": Case(loss(nn.CrossEntropyLoss), (C, T), some_ignored),
    "CrossEntropy, smoothing": Case(
        loss(nn.CrossEntropyLoss, label_smoothing=0.2), (C,), classes()
    ),
    "CrossEntropy, weights": Case(
        loss(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS), (C,), classes(), weighted_class
    ),
    "CrossEntropy, weights and smoothing": Case(
        loss(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS, label_smoothing=0.2),
        (C,),
        classes(),
        weighted_class,
    ),
    "CrossEntropy, soft targets": Case(
        loss(nn.CrossEntropyLoss), (C,), lambda: (torch.randn(B, C).double().softmax(1),)
    ),
    "NLL": Case(loss(nn.NLLLoss), (C,), classes(), link=log_softmax),
    "BCEWithLogits": Case(loss(nn.BCEWithLogitsLoss), (), positive()),
    "BCEWithLogits, (B, 1)": Case(loss(nn.BCEWithLogitsLoss), (1,), positive(1)),
    "BCEWithLogits, pos_weight": Case(
        loss(nn.BCEWithLogitsLoss, pos_weight=CLASS_WEIGHTS), (C,), positive(C)
    ),
    "BCE": Case(loss(nn.BCELoss), (2,), positive(2), link=torch.sigmoid),
    "MSE": Case(loss(nn.MSELoss), (), normal()),
    "MSE, images": Case(loss(nn.MSELoss), (2, 3, 3), normal(2, 3, 3)),
    "L1": Case(loss(nn.L1Loss), (2,), normal(2)),
    "Huber": Case(loss(nn.HuberLoss, delta=0.5), (2,), normal(2)),
    "SmoothL1": Case(loss(nn.SmoothL1Loss, beta=0.5), (2,), normal(2)),
    "KLDiv": Case(
        loss(nn.KLDivLoss), (C,), lambda: (torch.randn(B, C).double().softmax(1),), link=log_softmax
    ),
    "GaussianNLL": Case(loss(nn.GaussianNLLLoss), (2,), lambda: (*normal(2)(), *positive(2)())),
    "PoissonNLL": Case(loss(nn.PoissonNLLLoss), (2,), positive(2)),
    "SoftMargin": Case(loss(nn.SoftMarginLoss), (2,), signs(2)),
    "HingeEmbedding": Case(loss(nn.HingeEmbeddingLoss), (2,), signs(2)),
    "MultiMargin": Case(loss(nn.MultiMarginLoss), (C,), classes()),
    "MultiLabelSoftMargin": Case(
        loss(nn.MultiLabelSoftMarginLoss), (C,), lambda: (torch.randint(2, (B, C)).double(),)
    ),
    "MultiLabelMargin": Case(
        loss(nn.MultiLabelMarginLoss), (C,), lambda: (torch.tensor([[1, -1, -1], [0, 2, -1]] * 3),)
    ),
    "MarginRanking": Case(
        loss(nn.MarginRankingLoss, margin=0.5), (), lambda: (*normal()(), *signs()())
    ),
    "CosineEmbedding": Case(
        loss(nn.CosineEmbeddingLoss, margin=0.1), (C,), lambda: (*normal(C)(), *signs()())
    ),
    "TripletMargin": Case(loss(nn.TripletMarginLoss), (C,), lambda: (*normal(C)(), *normal(C)())),
    "CTC": Case(
        loss(nn.CTCLoss),
        (T, C),
        lambda: (
            torch.randint(1, C, (B, 2)),
            torch.full((B,), T),
            torch.tensor([2, 1, 2, 2, 1, 2]),
        ),
        sequence_of_ctc,
        link=lambda output: output.transpose(0, 1).log_softmax(2),
    ),
    "PerSampleLoss": Case(
        lambda reduction: PerSampleLoss(lambda a, b: (a - b).abs().pow(1.5), reduction),
        (2,),
        normal(2),
    ),
}
REDUCTIONS = [(name, r) for name in CASES for r in ("mean", "sum")] + [("KLDiv", "batchmean")]


@pytest.mark.parametrize(("name", "reduction"), REDUCTIONS, ids=lambda value: value)
def test_weights_and_scale(name, reduction):
    case = CASES[name]
    make, shape, arguments = case.make, case.shape, case.arguments()
    body = nn.Linear(WIDTH, max(1, torch.Size(shape).numel())).double()
    x = torch.randn(B, WIDTH).double()

    def output_of(model: nn.Module) -> Tensor:
        return case.link(model(x).reshape(B, *shape))

    def losses_of(model: nn.Module) -> Tensor:
        output, criterion = output_of(model), make("mean")
        of_sample = case.of_sample or alone
        return torch.stack([of_sample(criterion, output, arguments, i) for i in range(B)])

    ordinary = make(reduction)(output_of(body), *arguments)
    length = gradient_length(ordinary, losses_of(body), counts_of(name, reduction, arguments), body)
    truth = reference.step(losses_of(body), body.parameters(), ALPHA, scale=length)

    criterion = make(reduction)
    sgd = torch.optim.SGD(body.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=body, criterion=criterion, engine="ghost")
    loss = criterion(output_of(body), *arguments)
    assert loss.item() == pytest.approx(ordinary.item(), rel=1e-12)
    loss.backward()
    agree(optimizer, body, truth)


def counts_of(name: str, reduction: str, arguments: tuple) -> Tensor:
    """How often a sample's own mean goes into torch's reduction: its valid elements."""
    if name == "CrossEntropy, ignore_index":
        return (arguments[0] != -100).sum(1).double()
    if name == "CTC" and reduction == "sum":  # its mean divides by the lengths first
        return arguments[2].double()
    return torch.ones(B).double()


def gradient_length(ordinary: Tensor, losses: Tensor, counts: Tensor, model: nn.Module) -> float:
    """How often the mean of the losses, weighted by counts, goes into the ordinary gradient."""
    mean = (counts / counts.sum()) @ losses
    parameters = list(model.parameters())
    left = torch.autograd.grad(ordinary, parameters, retain_graph=True)
    right = torch.autograd.grad(mean, parameters)
    largest = max(range(len(right)), key=lambda i: float(right[i].abs().max()))
    at = right[largest].abs().argmax()
    scale = float(left[largest].flatten()[at] / right[largest].flatten()[at])
    for g, h in zip(left, right, strict=True):
        assert reference.error(g, scale * h, 0.1 * float(right[largest].abs().max())) < 1e-9
    return scale


EQUAL = [(name, r) for name, r in REDUCTIONS if name not in ("CrossEntropy, ignore_index", "CTC")]


@pytest.mark.parametrize(("name", "reduction"), EQUAL, ids=lambda value: value)
def test_uniform_weights_are_plain_training(name, reduction):
    case = CASES[name]
    arguments = case.arguments()
    body = nn.Linear(WIDTH, max(1, torch.Size(case.shape).numel())).double()
    output = case.link(body(torch.randn(B, WIDTH).double()).reshape(B, *case.shape))
    criterion = case.make(reduction)
    loss = criterion(output, *arguments)
    plain = torch.autograd.grad(loss, list(body.parameters()), retain_graph=True)
    sgd = torch.optim.SGD(body.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=1.0, model=body, criterion=criterion, weighting="uniform")
    criterion(output, *arguments).backward()
    assert optimizer.last_step.effective_sample_size == pytest.approx(B)
    errors = gradient_errors(body, list(plain))
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize(("name", "reduction"), REDUCTIONS, ids=lambda value: value)
def test_a_warm_up_is_plain_training(name, reduction):
    case = CASES[name]
    arguments = case.arguments()
    body = nn.Linear(WIDTH, max(1, torch.Size(case.shape).numel())).double()
    x = torch.randn(B, WIDTH).double()
    criterion = case.make(reduction)
    loss = criterion(case.link(body(x).reshape(B, *case.shape)), *arguments)
    plain = torch.autograd.grad(loss, list(body.parameters()))
    sgd = torch.optim.SGD(body.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=body, criterion=criterion, warmup_steps=1)
    criterion(case.link(body(x).reshape(B, *case.shape)), *arguments).backward()
    assert optimizer.last_step.weights.dtype == torch.float64
    assert float(optimizer.last_step.weights.sum()) == pytest.approx(1.0, rel=1e-14)
    errors = gradient_errors(body, list(plain))
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("weighting", ["irw", "cvar", "uniform"])
def test_the_loop_sees_the_value_of_the_criterion_to_the_bit(weighting):
    body = nn.Linear(WIDTH, 1)
    x, y = torch.randn(B, WIDTH), torch.randn(B, 1)
    y[:2] = torch.tensor([[-1e4], [1e4]])  # losses far from their mean
    criterion = PerSampleLoss(lambda a, b: a - b)
    own = criterion(body(x), y)
    sgd = torch.optim.SGD(body.parameters(), lr=0.1)
    options = {"alpha": 0.1, "model": body, "criterion": criterion, "weighting": weighting}
    optimizer = IRWOptimizer(sgd, **options)
    assert optimizer.criterion is criterion  # and it lives
    assert torch.equal(criterion(body(x), y).detach(), own.detach())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "reduction": lambda c: setattr(c, "reduction", "sum"),
    "weight": lambda c: setattr(c, "weight", CLASS_WEIGHTS),
    "label_smoothing": lambda c: setattr(c, "label_smoothing", 0.2),
    "ignore_index": lambda c: setattr(c, "ignore_index", 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_on_a_criterion_is_noticed(change):
    torch.manual_seed(0)
    model, criterion = nn.Linear(WIDTH, C).double(), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=ALPHA, model=model, criterion=criterion)
    x, y = torch.randn(B, WIDTH).double(), torch.tensor([0, 1, 2, 0, 2, 1])
    for step in range(4):
        if step == 2:
            CHANGES[change](criterion)
        own = nn.CrossEntropyLoss(
            criterion.weight, ignore_index=criterion.ignore_index, reduction=criterion.reduction,
            label_smoothing=criterion.label_smoothing,
        )  # fmt: skip
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        torch.testing.assert_close(loss, own(model(x), y))
        loss.backward()
        own.reduction = "none"
        torch.testing.assert_close(optimizer.last_step.losses, own(model(x), y).detach())
        grown = criterion.reduction == "sum"
        total = model.weight.grad.clone()
        model.zero_grad()
        weights = optimizer.last_step.weights
        length = loss.new_tensor(B if grown else 1.0)
        if change == "weight" and step >= 2:
            length = B / CLASS_WEIGHTS[y].sum()
        (own(model(x), y) * weights).sum().mul(length).backward()
        torch.testing.assert_close(total, model.weight.grad)
