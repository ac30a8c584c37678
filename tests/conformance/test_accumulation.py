"""Gradient accumulation in both meanings, against the loop over the samples of the whole batch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import reference
import torch
from inner_optimizers import ALPHA, CLASSES, FEATURES, SGD, Run
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.backward.accumulation import ConcatenatedGradients
from irw_optim.gradients import MaterializedGradients

DEVICE = torch.get_default_device().type
SIZES = (5, 2, 4)
K = len(SIZES)


class MixesTheBatch(nn.Module):
    """No ghost products here: all samples meet in the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 6, bias=False)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.linear(x)).tanh())


class UsesALayerForLongBatches(nn.Module):
    """The second batch, of 2 samples, has no gradient in ``extra``; the last one has."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.extra = nn.Linear(FEATURES, FEATURES)
        self.out = nn.Linear(FEATURES, CLASSES)
        self.longest = longest

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if len(x) >= self.longest:
            hidden = self.extra(hidden)
        return self.out(hidden.tanh())


MODELS = {
    "layers": lambda: SGD.model(),
    "batch norm": lambda: MixesTheBatch().double(),
    "a layer not used by all": lambda: UsesALayerForLongBatches(3).double(),
    "a layer not used by the last": lambda: UsesALayerForLongBatches(5).double(),
}
models = pytest.mark.parametrize("name", MODELS)


def built(name: str, **options: Any) -> Run:
    torch.manual_seed(0)
    return Run(SGD, MODELS[name](), **options)


def physical_batches() -> list[tuple[Tensor, Tensor]]:
    ((x, y),) = SGD.batches(1, sum(SIZES))
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def accumulate(run: Run, factors: tuple[float, ...] = (1 / K,) * K, scale: float = 1.0) -> None:
    for (x, y), factor in zip(physical_batches(), factors, strict=True):
        (scale * factor * run.criterion(run.model(x), y)).backward()


def oracle(run: Run, **options: Any) -> reference.Step:
    losses = torch.cat(
        [cross_entropy(run.model(x), y, reduction="none") for x, y in physical_batches()]
    )
    return reference.step(losses, run.parameters, ALPHA, **options)


def gradients(run: Run) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in run.parameters]


@models
def test_by_default_each_physical_batch_has_its_own_worst_off(name: str) -> None:
    run = built(name)
    steps = [
        reference.step(cross_entropy(run.model(x), y, reduction="none"), run.parameters, ALPHA)
        for x, y in physical_batches()
    ]
    accumulate(run)
    for found, *parts in zip(gradients(run), *(s.gradients for s in steps), strict=True):
        assert reference.error(found, sum(parts) / K) < 1e-9
    assert len(run.optimizer.last_step.weights) == SIZES[-1]


@models
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": 1.0, "mix": 0.25},
        {"class_balance": True},
        {"score_parameters": "last"},
        {"engine": "autodiff"},
    ],
    ids=str,
)
def test_the_worst_off_of_the_logical_batch(name: str, options: dict[str, Any]) -> None:
    """Exactly the step on the whole batch, in the passes that autograd makes anyway."""
    run = built(name, accumulation_steps=K, **options)
    told = {n: v for n, v in options.items() if n in ("center", "mix")}
    if "class_balance" in options:
        told["labels"] = torch.cat([y for _, y in physical_batches()]).tolist()
    if "score_parameters" in options:
        told["scored"] = run.parameters[-2:]
    expected = oracle(run, **told)
    accumulate(run)
    record = run.optimizer.last_step
    assert torch.equal(record.worst_off, expected.worst_off)
    assert reference.error(record.weights, expected.weights) < 1e-9
    for found, gradient in zip(gradients(run), expected.gradients, strict=True):
        assert reference.error(found, gradient) < 1e-9
    run.optimizer.step()
    assert run.optimizer.steps == 1


@models
def test_outliers_of_the_logical_batch(name: str) -> None:
    filter_ = DBSCANFilter("auto", min_samples=3, quantile=0.7)
    run = built(name, accumulation_steps=K, outliers=filter_)
    G = oracle(run).G
    removed = filter_(G @ G.T)
    assert 0 < removed.sum() < len(removed)
    expected = oracle(run, removed=removed.nonzero().flatten().tolist())
    accumulate(run)
    assert torch.equal(run.optimizer.last_step.outliers, removed)
    for found, gradient in zip(gradients(run), expected.gradients, strict=True):
        assert reference.error(found, gradient) < 1e-8


@pytest.mark.parametrize("weighting", ["cvar", "uniform"])
def test_rules_that_look_at_losses_alone(weighting: str) -> None:
    run = built("layers", accumulation_steps=K, weighting=weighting)
    step = oracle(run)
    chosen = step.worst_off if weighting == "cvar" else torch.ones_like(step.worst_off)
    expected = (chosen.double() / chosen.sum()) @ step.G
    accumulate(run)
    found = torch.cat([g.flatten() for g in gradients(run)])
    assert reference.error(found, expected) < 1e-9


def test_the_gradient_is_there_after_the_last_pass_and_not_before() -> None:
    run = built("layers", accumulation_steps=K)
    for number, (x, y) in enumerate(physical_batches(), start=1):
        run.criterion(run.model(x), y).backward()
        assert all((p.grad is not None) == (number == K) for p in run.parameters)
        assert (run.optimizer.last_step is not None) == (number == K)


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.1), (0.0, 1.0, 1.0)], ids=str)
def test_factors_on_the_losses_give_the_length_of_the_gradient(factors: tuple[float, ...]) -> None:
    run = built("layers", accumulation_steps=K)
    expected = oracle(run)
    accumulate(run, factors)
    for found, gradient in zip(gradients(run), expected.gradients, strict=True):
        assert reference.error(found, sum(factors) * gradient) < 1e-9


def test_frozen_between_the_passes_a_layer_keeps_the_gradient_of_those_before() -> None:
    run = built("layers", accumulation_steps=K)
    frozen, losses = run.parameters[0], []
    for number, (x, y) in enumerate(physical_batches()):
        frozen.requires_grad_(number == 0)
        losses.append(cross_entropy(run.model(x), y, reduction="none"))
        (run.criterion(run.model(x), y) / K).backward()
    weights = run.optimizer.last_step.weights[: SIZES[0]]
    (expected,) = torch.autograd.grad(losses[0] @ weights, [frozen.requires_grad_()])
    assert reference.error(frozen.grad, expected) < 1e-9
    assert all(p.grad is not None for p in run.parameters)


def test_a_sum_criterion() -> None:
    run = built("layers", accumulation_steps=K)
    expected = oracle(run)
    run.criterion.reduction = "sum"
    accumulate(run, (1.0, 1.0, 1.0))
    for found, gradient in zip(gradients(run), expected.gradients, strict=True):
        assert reference.error(found, sum(SIZES) * gradient) < 1e-9


@models
@pytest.mark.parametrize("ending", ["finish", "step", "closure"])
def test_a_short_logical_batch_is_decided_at_the_step(name: str, ending: str) -> None:
    run = built(name, accumulation_steps=K + 2)
    expected = oracle(run)
    before = [p.detach().clone() for p in run.parameters]
    accumulate(run)
    assert all(p.grad is None for p in run.parameters)
    if ending == "finish":
        run.optimizer.finish()
        for found, gradient in zip(gradients(run), expected.gradients, strict=True):
            assert reference.error(found, gradient) < 1e-9
        nn.utils.clip_grad_norm_(run.parameters, 1e9)
    run.optimizer.step((lambda: torch.ones(())) if ending == "closure" else None)
    for p, start, gradient in zip(run.parameters, before, expected.gradients, strict=True):
        decay = 1e-3 * start
        assert reference.error(p.detach(), start - 0.1 * (gradient + decay)) < 1e-9
    assert len(run.optimizer.last_step.weights) == sum(SIZES)
    accumulate(run)  # nothing of the old batch is in the next one
    run.optimizer.finish()
    assert len(run.optimizer.last_step.weights) == sum(SIZES)


def test_several_logical_batches_are_the_training_on_whole_batches() -> None:
    parts, whole = built("layers", accumulation_steps=2), built("layers")
    for x, y in SGD.batches(5, 8):
        parts.optimizer.zero_grad()
        for half in (slice(4), slice(4, None)):
            (parts.criterion(parts.model(x[half]), y[half]) / 2).backward()
        parts.optimizer.step()
        whole.step(x, y)
    for p, q in zip(parts.parameters, whole.parameters, strict=True):
        assert reference.error(p.detach(), q.detach()) < 1e-9


def test_the_warm_up_is_plain_accumulation() -> None:
    run = built("layers", accumulation_steps=K, warmup_steps=1)
    accumulate(run)
    plain = MODELS["layers"]()
    for x, y in physical_batches():
        (cross_entropy(plain(x), y) / K).backward()
    for found, p in zip(gradients(run), plain.parameters(), strict=True):
        assert reference.error(found, p.grad) < 1e-12


@models
def test_hooks_on_parameters_hear_the_gradient_once(name: str) -> None:
    run = built(name, accumulation_steps=K)
    heard: list[Tensor] = []
    for p in run.parameters:
        p.register_post_accumulate_grad_hook(lambda p: heard.append(p.grad))
    accumulate(run)
    assert len(heard) == len(run.parameters)
    assert all(isinstance(gradient, Tensor) for gradient in heard)


def test_a_scaler_and_an_infinite_gradient() -> None:
    run = built("layers", accumulation_steps=K)
    scaler = GradScaler(DEVICE, init_scale=2.0**10)
    for poison in (None, float("inf")):
        before = [p.detach().clone() for p in run.parameters]
        run.optimizer.zero_grad()
        expected = oracle(run)
        for x, y in physical_batches():
            scaler.scale(run.criterion(run.model(x), y) / K).backward()
        if poison is not None:
            run.parameters[0].grad[0, 0] = poison
        scaler.unscale_(run.optimizer)
        if poison is None:
            for found, gradient in zip(gradients(run), expected.gradients, strict=True):
                assert reference.error(found, gradient) < 1e-9
        scaler.step(run.optimizer)
        scaler.update()
        moved = not all(map(torch.equal, run.parameters, before))
        assert moved == (poison is None)
    assert run.optimizer.steps == 1


def test_what_is_kept_is_let_go() -> None:
    run = built("batch norm", accumulation_steps=K)
    kept: list[weakref.ref[Any]] = []

    def first_pass() -> None:
        x, y = physical_batches()[0]
        output = run.model(x)
        kept.append(weakref.ref(output))
        run.criterion(output, y).backward()

    for let_go in (run.optimizer.zero_grad, run.optimizer.finish, run.optimizer.detach):
        first_pass()
        let_go()
        gc.collect()
        assert kept[-1]() is None


def test_a_logical_batch_thrown_away_is_not_in_the_next_one() -> None:
    run = built("layers", accumulation_steps=K)
    expected = oracle(run)
    x, y = physical_batches()[0]
    run.criterion(run.model(x), y).backward()
    run.optimizer.zero_grad()
    accumulate(run)
    assert len(run.optimizer.last_step.weights) == sum(SIZES)
    for found, gradient in zip(gradients(run), expected.gradients, strict=True):
        assert reference.error(found, gradient) < 1e-9


def test_another_term_in_the_loss() -> None:
    """Fine where the layers are covered; refused where the graph would be needed again."""
    run = built("layers", accumulation_steps=K)
    expected, penalties = oracle(run), []
    for x, y in physical_batches():
        output = run.model(x)
        penalty = output.square().mean()
        penalties.append(penalty)
        (run.criterion(output, y) / K + penalty).backward()
    plain = MODELS["layers"]()
    sum(plain(x).square().mean() for x, _ in physical_batches()).backward()
    for found, gradient, p in zip(
        gradients(run), expected.gradients, plain.parameters(), strict=True
    ):
        assert reference.error(found, gradient + p.grad) < 1e-9

    mixing = built("batch norm", accumulation_steps=K)
    (x, y), *_ = physical_batches()
    output = mixing.model(x)
    with pytest.raises(RuntimeError, match=r"another term.*retain_graph=True"):
        (mixing.criterion(output, y) + output.square().mean()).backward()


def test_a_second_pass_through_one_loss_is_refused() -> None:
    run = built("layers", accumulation_steps=K)
    (x, y), *_ = physical_batches()
    loss = run.criterion(run.model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass.*logical batch"):
        loss.backward()


def test_an_input_overwritten_before_the_end_is_found_out() -> None:
    run = built("layers", accumulation_steps=2)
    (x, y), *_ = physical_batches()
    run.criterion(run.model(x), y).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        run.criterion(run.model(x), y).backward()


def test_way_two_accumulates_too() -> None:
    model = SGD.model()
    optimizer = IRWOptimizer(SGD.inner(model), alpha=ALPHA, model=model, accumulation_steps=K)
    for x, y in physical_batches():
        optimizer.backward(cross_entropy(model(x), y, reduction="none") / K)
    run = built("layers")
    for p, gradient in zip(model.parameters(), oracle(run).gradients, strict=True):
        assert reference.error(p.grad, gradient) < 1e-9


def test_rows_of_several_batches() -> None:
    weight, other = torch.zeros(1), torch.zeros(2)
    batches = [{weight: torch.tensor([[1.0], [2.0]])}, {weight: torch.tensor([[3.0]])}]
    batches[1][other] = torch.tensor([[4.0, 5.0]])
    G = ConcatenatedGradients(map(MaterializedGradients, batches), like=weight)
    assert G.combine(torch.ones(3))[weight].tolist() == [6]
    assert G.combine(torch.ones(3))[other].tolist() == [4, 5]
    assert G.dot({weight: torch.ones(1)}).tolist() == [1, 2, 3]
    assert G.gram().tolist() == [[1, 2, 3], [2, 4, 6], [3, 6, 9 + 16 + 25]]


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "2"])
def test_impossible_numbers_of_passes(steps: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"accumulation_steps={steps!r}: expected"):
        Run(SGD, accumulation_steps=steps)
