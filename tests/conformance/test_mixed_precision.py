"""GradScaler's contract and autocast: the scale is never in weights, update or state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference
import torch
from inner_optimizers import ADAM, ALPHA, SGD, Inner, Run, same
from torch import Tensor, nn
from torch.amp import GradScaler

from irw_optim import IRWOptimizer

DEVICE = torch.get_default_device().type

FUSED = [
    Inner("Adam-fused", lambda p: torch.optim.Adam(p, lr=1e-2, fused=True)),
    Inner("SGD-fused", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)),
]
inners = pytest.mark.parametrize("inner", [SGD, ADAM, *FUSED], ids=str)


def single_precision(inner: Inner, **options: Any) -> Run:
    return Run(inner, inner.model().float(), **options)


def batches(number: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(x.float(), y) for x, y in SGD.batches(number)]


def scaled_step(
    run: Run,
    scaler: GradScaler,
    batch: tuple[Tensor, Tensor],
    *,
    clip: float | None = None,
    poison: float | None = None,
) -> Any:
    x, y = batch
    run.optimizer.zero_grad()
    loss = run.criterion(run.model(x), y)
    scaler.scale(loss).backward()
    if poison is not None:
        run.parameters[0].grad[0, 0] = poison
    if clip is not None:
        scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.parameters, clip)
    result = scaler.step(run.optimizer)
    scaler.update()
    return result


@inners
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_scaled_training_is_unscaled_training(inner: Inner, clip: float | None) -> None:
    """A scale that is a power of two leaves every bit as it was."""
    if clip is not None and inner in FUSED:
        pytest.skip("torch refuses to unscale twice")
    scaled, plain = single_precision(inner), single_precision(inner)
    scaler = GradScaler(DEVICE, init_scale=2.0**12)
    for x, y in batches():
        scaled_step(scaled, scaler, (x, y), clip=clip)
        plain.evaluate(x, y)
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters, clip)
        plain.optimizer.step()
        assert torch.equal(scaled.optimizer.last_step.weights, plain.optimizer.last_step.weights)
        assert torch.equal(scaled.optimizer.last_step.scores, plain.optimizer.last_step.scores)
    assert all(map(torch.equal, scaled.parameters, plain.parameters))
    assert same(scaled.optimizer.state_dict(), plain.optimizer.state_dict())


@inners
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("zeroing", ["optimizer", "inner", "inner, kept", "model", "model, kept"])
def test_a_step_skipped_for_infinity_changes_nothing(
    inner: Inner, poison: float, zeroing: str
) -> None:
    run, scaler = single_precision(inner), GradScaler(DEVICE, init_scale=2.0**12)
    first, skipped, last = batches(3)
    scaled_step(run, scaler, first)
    parameters = [p.detach().clone() for p in run.parameters]
    state = copy.deepcopy(run.optimizer.state_dict())
    assert scaled_step(run, scaler, skipped, poison=poison) is None
    assert all(map(torch.equal, run.parameters, parameters))
    assert same(run.optimizer.state_dict(), state)
    assert run.optimizer.steps == 1
    assert scaler.get_scale() == 2.0**11

    owner = {"o": run.optimizer, "i": run.optimizer.inner, "m": run.model}[zeroing[0]]
    owner.zero_grad(set_to_none="kept" not in zeroing)
    x, y = last
    scaler.scale(run.criterion(run.model(x), y)).backward()
    scaler.step(run.optimizer)  # the gradient of the skipped batch is gone, and with it its record
    assert run.optimizer.steps == 2
    assert not all(map(torch.equal, run.parameters, parameters))


@inners
@pytest.mark.parametrize("broken", ["losses", "gradients"])
def test_the_scaler_decides_about_a_batch_that_is_not_finite(inner: Inner, broken: str) -> None:
    run, scaler = single_precision(inner), GradScaler(DEVICE, init_scale=2.0**12)
    x, y = batches(1)[0]
    scaled_step(run, scaler, (x, y))
    state = copy.deepcopy(run.optimizer.state_dict())
    parameters = [p.detach().clone() for p in run.parameters]
    if broken == "losses":
        x = x.index_fill(0, torch.tensor([3]), float("inf"))
    else:
        scaler = GradScaler(DEVICE, init_scale=float("inf"))
    scaled_step(run, scaler, (x, y))
    assert all(map(torch.equal, run.parameters, parameters))
    assert same(run.optimizer.state_dict(), state)
    run.model.zero_grad()
    run.step(*batches(1)[0])  # and without the scaler, training goes on
    assert run.optimizer.steps == 2


def test_a_disabled_scaler_is_transparent() -> None:
    run, plain = single_precision(SGD), single_precision(SGD)
    scaler = GradScaler(DEVICE, enabled=False)
    for batch in batches():
        scaled_step(run, scaler, batch)
        plain.step(*batch)
    assert all(map(torch.equal, run.parameters, plain.parameters))


@pytest.mark.parametrize("inner", [SGD, *FUSED], ids=str)
def test_who_unscales_is_the_inner_optimizers_choice(inner: Inner) -> None:
    optimizer = single_precision(inner).optimizer
    supports = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert supports == getattr(optimizer.inner, "_step_supports_amp_scaling", False)
    assert supports == (inner in FUSED)
    for name in ("grad_scale", "found_inf"):
        assert not hasattr(optimizer, name)
        setattr(optimizer, name, torch.ones(()))
        assert getattr(optimizer.inner, name) is getattr(optimizer, name)
        delattr(optimizer, name)
        assert not hasattr(optimizer.inner, name)


class TakesTheScaler(torch.optim.SGD):
    """An optimizer of the older kind, which asks for the scaler as an argument."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:
        return super().step(closure)


def test_an_optimizer_that_takes_the_scaler_as_argument_gets_unscaled_gradients() -> None:
    old = Inner("old", lambda p: TakesTheScaler(p, lr=0.1, momentum=0.9, weight_decay=1e-3))
    scaled, plain = single_precision(old), single_precision(SGD)
    scaler = GradScaler(DEVICE, init_scale=2.0**12)
    for batch in batches():
        scaled_step(scaled, scaler, batch)
        plain.step(*batch)
    assert all(map(torch.equal, scaled.parameters, plain.parameters))


@pytest.mark.parametrize("factor", [1 / 3, 1e-6, 1e6, -1.0])
def test_a_factor_on_the_loss_scales_the_gradient_and_not_the_weights(factor: float) -> None:
    run, other = Run(SGD), Run(SGD)
    x, y = SGD.batches(1)[0]
    run.evaluate(x, y)
    (factor * other.criterion(other.model(x), y)).backward()
    weights, scaled = run.optimizer.last_step.weights, other.optimizer.last_step.weights
    assert reference.error(scaled, weights) < 1e-12
    for p, q in zip(run.parameters, other.parameters, strict=True):
        assert reference.error(q.grad, factor * p.grad) < 1e-12


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 32),
        nn.GELU(),
        nn.LayerNorm(32),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_autocast(dtype: torch.dtype, engine: str) -> None:
    """Scores and weights in float32, and the gradient as close as half precision allows."""
    model, criterion = deep(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        alpha=ALPHA,
        model=model,
        criterion=criterion,
        engine=engine,
    )
    twin = deep()
    scaler = GradScaler(DEVICE, init_scale=2.0**10, enabled=dtype == torch.float16)
    for x, y in batches(3):
        twin.load_state_dict(model.state_dict())
        with torch.autocast(DEVICE, dtype=dtype):
            losses = nn.functional.cross_entropy(twin(x), y, reduction="none")
        assert losses.dtype == torch.float32
        oracle = reference.step(losses, twin.parameters(), ALPHA)

        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype):
            output = model(x)
            loss = criterion(output, y)
        assert output.dtype == dtype
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        record = optimizer.last_step
        assert record.scores.dtype == record.weights.dtype == torch.float32
        assert torch.equal(record.worst_off, oracle.worst_off)
        assert reference.error(record.weights, oracle.weights) < 0.1
        for p, expected in zip(model.parameters(), oracle.gradients, strict=True):
            assert p.grad.dtype == torch.float32
            assert reference.error(p.grad, expected) < 0.1
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert not all(map(torch.equal, model.parameters(), before))


def test_weights_under_fp16_do_not_depend_on_the_scale() -> None:
    x, y = batches(1)[0]
    weights = []
    for scale in (1.0, 2.0**8, 2.0**12):
        model, criterion = deep(), nn.CrossEntropyLoss()
        optimizer = IRWOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            alpha=ALPHA,
            model=model,
            criterion=criterion,
        )
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = criterion(model(x), y)
        (scale * loss).backward()
        weights.append(optimizer.last_step.weights)
    assert reference.error(weights[0], weights[1]) < 1e-2
    assert reference.error(weights[1], weights[2]) < 1e-3


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"maximize": True}], ids=str
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_options_of_the_inner_optimizer(kind: Any, options: dict[str, bool]) -> None:
    plain = Inner("plain", lambda p: kind(p, lr=0.1))
    variant = Inner("variant", lambda p: kind(p, lr=0.1, **options))
    ours, theirs = Run(variant).train(SGD.batches()), Run(plain)
    if "maximize" in options:
        theirs = Run(Inner("reversed", lambda p: kind(p, lr=0.1)))
        theirs.criterion.register_forward_hook(lambda m, args, loss: -loss)
    theirs.train(SGD.batches())
    for p, q in zip(ours.parameters, theirs.parameters, strict=True):
        assert reference.error(p.detach(), q.detach()) < 1e-9
