"""The third way in: gradients that Opacus made, ``optimizer.step(losses=losses)``."""

from __future__ import annotations

import logging

import pytest
import reference
import torch
import torch.nn.functional as F
from agreement import agree, gradient_errors
from opacus.grad_sample import GradSampleHooks, wrap_model
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer

ALPHA, B = 0.3, 8
MODES = ("hooks", "functorch", "ew")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 2, 3),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


def batch(size: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 4).double(), torch.randint(3, (size,))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def optimizer_over(wrapped: nn.Module, **options) -> IRWOptimizer:
    return IRWOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1), **{"alpha": ALPHA, **options}
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [mlp, convolutions])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_training(make, mode, reduction):
    plain = make()
    twin = make()
    twin.load_state_dict(plain.state_dict())
    model = wrap_model(plain, grad_sample_mode=mode, loss_reduction=reduction)
    optimizer = optimizer_over(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1)
    for size in (B, B, 3):
        data = batch(size)
        truth = reference.step(losses_of(twin, *data), twin.parameters(), ALPHA)
        optimizer.zero_grad()
        losses = losses_of(model, *data)
        (losses.mean() if reduction == "mean" else losses.sum()).backward()
        optimizer.step(losses=losses)
        agree(optimizer, model, truth)
        for p, g in zip(twin.parameters(), truth.gradients, strict=True):
            p.grad = g
        sgd.step()
    for ours, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert reference.error(ours, its) < 1e-9


def test_hooks_without_a_wrapper():
    model, data = mlp(), batch()
    truth = reference.step(losses_of(model, *data), model.parameters(), ALPHA)
    GradSampleHooks(model)
    optimizer = optimizer_over(model)
    losses = losses_of(model, *data)
    losses.mean().backward()
    optimizer.step(losses=losses)
    agree(optimizer, model, truth)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_the_other_ways_on_a_wrapped_model(mode):
    plain, data = mlp(), batch()
    truth = reference.step(losses_of(plain, *data), plain.parameters(), ALPHA)
    model = wrap_model(plain, grad_sample_mode=mode)
    criterion = nn.CrossEntropyLoss()
    optimizer = optimizer_over(model, model=model, criterion=criterion)
    criterion(model(data[0]), data[1]).backward()
    agree(optimizer, model, truth)
    optimizer.zero_grad()
    optimizer.backward(losses_of(model, *data))
    agree(optimizer, model, truth)


@pytest.mark.parametrize(
    "options",
    [{"center": 1.0}, {"mix": 0.5}, {"weighting": "cvar"}, {"weighting": "uniform"}],
    ids=str,
)
def test_options_as_in_the_other_ways(options):
    plain, data = mlp(), batch()
    twin = mlp()
    twin.load_state_dict(plain.state_dict())
    first = optimizer_over(twin, model=twin, **options)
    first.backward(losses_of(twin, *data))
    model = wrap_model(plain, grad_sample_mode="hooks")
    second = optimizer_over(model, **options)
    losses = losses_of(model, *data)
    losses.mean().backward()
    second.step(losses=losses)
    assert reference.error(second.last_step.weights, first.last_step.weights) < 1e-9
    errors = gradient_errors(model, [p.grad for p in twin.parameters()])
    assert max(errors.values()) < 1e-9


def test_class_balance_takes_labels():
    plain, (x, y) = mlp(), batch()
    truth = reference.step(losses_of(plain, x, y), plain.parameters(), ALPHA, labels=y)
    model = wrap_model(plain, grad_sample_mode="hooks")
    optimizer = optimizer_over(model, class_balance=True)
    losses = losses_of(model, x, y)
    losses.mean().backward()
    optimizer.step(losses=losses, labels=y)
    agree(optimizer, model, truth)


def test_outliers():
    plain, (x, y) = mlp(), batch(12)
    x[3] *= 50
    y[3] = plain(x)[3].argmin()
    eps = 4.0
    G = reference.per_sample_gradients(losses_of(plain, x, y), plain.parameters())
    near = torch.cdist(G, G) <= eps
    core = near.sum(1) >= 4
    noise = [i for i in range(12) if not core[i] and not (near[i] & core).any()]
    assert 0 < len(noise) < 12
    truth = reference.step(losses_of(plain, x, y), plain.parameters(), ALPHA, removed=noise)
    model = wrap_model(plain, grad_sample_mode="hooks")
    optimizer = optimizer_over(model, outliers=DBSCANFilter(eps=eps, min_samples=4))
    losses = losses_of(model, x, y)
    losses.mean().backward()
    optimizer.step(losses=losses)
    agree(optimizer, model, truth)


def test_frozen_parameters():
    plain, data = mlp(), batch()
    plain[0].requires_grad_(False)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    truth = reference.step(losses_of(plain, *data), trainable, ALPHA)
    model = wrap_model(plain, grad_sample_mode="hooks")
    optimizer = optimizer_over(model)
    losses = losses_of(model, *data)
    losses.mean().backward()
    optimizer.step(losses=losses)
    agree(optimizer, model, truth)


class TestTheGradientBesideTheRows:
    """The step is made of the rows: what happened to p.grad alone would be lost in silence."""

    def prepared(self, mode="hooks", reduction="mean"):
        plain, data = mlp(), batch()
        truth = reference.step(losses_of(plain, *data), plain.parameters(), ALPHA)
        model = wrap_model(plain, grad_sample_mode=mode, loss_reduction=reduction)
        before = [p.detach().clone() for p in model.parameters()]
        return model, optimizer_over(model), losses_of(model, *data), truth, before

    @pytest.mark.parametrize("mode", ["hooks", "functorch"])  # "ew" leaves no p.grad at all
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("unscaled", [False, True])
    @pytest.mark.parametrize("scale", [2.0**16, 0.5, 3.0])
    def test_a_gradient_scaler_is_refused(self, mode, reduction, unscaled, scale):
        model, optimizer, losses, _, before = self.prepared(mode, reduction)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(losses.mean() if reduction == "mean" else losses.sum()).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"times the mean of .*: a gradient scaler"):
            scaler.step(optimizer, losses=losses)
        assert all(map(torch.equal, before, model.parameters()))
        assert optimizer.last_step is None

    def test_the_way_that_the_error_names(self):
        model, data = mlp(), batch()
        truth = reference.step(losses_of(model, *data), model.parameters(), ALPHA)
        optimizer = optimizer_over(model, model=model)
        scaler = torch.amp.GradScaler("cpu")
        optimizer.backward(scaler.scale(losses_of(model, *data)))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        for p, old, g in zip(model.parameters(), before, truth.gradients, strict=True):
            assert reference.error(p, old - 0.1 * g) < 1e-9

    def test_a_scaler_that_is_switched_off(self):
        model, optimizer, losses, truth, _ = self.prepared()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        scaler.scale(losses.mean()).backward()
        scaler.step(optimizer, losses=losses)
        agree(optimizer, model, truth)

    def test_a_gradient_that_was_cleared(self):
        model, optimizer, losses, truth, _ = self.prepared()
        losses.mean().backward()
        optimizer.inner.zero_grad()
        optimizer.step(losses=losses)
        agree(optimizer, model, truth)

    @pytest.mark.parametrize("what", ["term", "norm", "value", "parameter"])
    def test_anything_else_is_refused(self, what):
        model, optimizer, losses, _, before = self.prepared()
        first = next(model.parameters())
        losses.mean().backward()
        if what == "term":
            first.grad += 2 * first.detach()
        elif what == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        elif what == "value":
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        else:
            first.grad.mul_(2)
        with pytest.raises(RuntimeError, match=r"p\.grad is .* the mean of p\.grad_sample"):
            optimizer.step(losses=losses)
        assert all(map(torch.equal, before, model.parameters()))

    def test_rows_that_lack_a_use_outside_the_layer_are_refused(self):
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(self.layer(x), self.layer.weight)

        model = Twice().double()
        GradSampleHooks(model)
        optimizer = optimizer_over(model)
        losses = losses_of(model, *batch())
        losses.mean().backward()
        with pytest.raises(RuntimeError, match="used outside their layers"):
            optimizer.step(losses=losses)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rounding_is_no_difference(self, dtype):
        model = wrap_model(mlp().to(dtype), grad_sample_mode="hooks")
        optimizer = optimizer_over(model)
        for size in (1, 2, B, 64):
            x, y = batch(size)
            optimizer.zero_grad()
            losses = losses_of(model, x.to(dtype), y)
            losses.mean().backward()
            optimizer.step(losses=losses)
        assert optimizer.steps == 4

    def test_gradients_that_cancel_are_no_difference(self):
        """At the end of a training the mean is rounding, and its factor could be anything."""
        model = wrap_model(nn.Linear(1, 1, bias=False), grad_sample_mode="hooks")
        optimizer = optimizer_over(model)
        losses = (model(torch.tensor([[1.0], [-1.0 - 1e-7]])) * 1e3).squeeze(1)
        losses.mean().backward()
        rows = [p.grad_sample.clone() for p in model.parameters()]
        next(model.parameters()).grad.mul_(1.5)  # which is 1e-7 of the rows
        optimizer.step(losses=losses)
        weighted = torch.tensordot(optimizer.last_step.weights, rows[0], dims=1)
        assert reference.error(next(model.parameters()).grad, weighted) < 1e-6


class Centred(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class InBatchNegatives(nn.Module):
    """Every sample's loss reads what was computed of all of them."""

    def forward(self, h: Tensor) -> Tensor:
        return h @ h.detach().mean(0, keepdim=True).T + h @ torch.tanh(h).sum(0, keepdim=True).T


@pytest.mark.parametrize(
    ("layer", "graph", "said"),
    [
        (nn.Tanh, True, []),
        (nn.Tanh, False, ["INFO"]),
        (Centred, True, ["WARNING"]),
        (InBatchNegatives, True, ["WARNING"]),
    ],
    ids=["apart", "apart, unseen", "mixed", "shared"],
)
def test_whether_samples_meet_is_said_once(layer, graph, said, caplog):
    model = nn.Sequential(nn.Linear(4, 3), layer()).double()
    model = wrap_model(model, grad_sample_mode="hooks")
    optimizer = optimizer_over(model)
    with caplog.at_level(logging.INFO, "irw_optim"):
        for _ in range(3):
            optimizer.zero_grad()
            losses = model(batch()[0]).square().sum(1)
            losses.mean().backward()
            optimizer.step(losses=losses if graph else losses.detach())
    assert [record.levelname for record in caplog.records] == said


class TestBadInput:
    def test_the_other_ways_on_expanded_weights(self):
        model = wrap_model(mlp(), grad_sample_mode="ew")
        with pytest.raises(TypeError, match=r"ExpandedWeights.*optimizer\.step\(losses=losses\)"):
            optimizer_over(model, model=model)

    @pytest.fixture
    def model(self):
        return wrap_model(mlp(), grad_sample_mode="hooks")

    def unchanged(self, model, call, kind, message):
        before = [p.detach().clone() for p in model.parameters()]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with pytest.raises(kind, match=message):
            call()
        assert all(map(torch.equal, before, model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            assert p.grad is g is None or torch.equal(p.grad, g)

    def test_losses_of_another_batch(self, model):
        optimizer = optimizer_over(model)
        losses_of(model, *batch()).mean().backward()
        self.unchanged(
            model,
            lambda: optimizer.step(losses=torch.rand(5)),
            ValueError,
            r"losses has 5 samples but p\.grad_sample has 8",
        )

    def test_two_backward_passes(self, model):
        optimizer = optimizer_over(model)
        for _ in range(2):
            losses = losses_of(model, *batch())
            losses.mean().backward()
        self.unchanged(
            model,
            lambda: optimizer.step(losses=losses),
            RuntimeError,
            r"2 backward passes.*zero_grad",
        )

    def test_losses_that_are_no_vector(self, model):
        optimizer = optimizer_over(model)
        losses = losses_of(model, *batch())
        losses.mean().backward()
        self.unchanged(
            model,
            lambda: optimizer.step(losses=losses.mean()),
            ValueError,
            r"losses has shape \(\)",
        )

    def test_losses_that_are_not_finite(self, model):
        optimizer = optimizer_over(model)
        x, y = batch()
        x[2] = torch.nan
        losses = losses_of(model, x, y)
        losses.mean().backward()
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(FloatingPointError, match="indices 2"):
            optimizer.step(losses=losses)
        assert all(map(torch.equal, before, model.parameters()))

    def test_a_layer_that_opacus_does_not_cover(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.PReLU(3)).double()
        GradSampleHooks(model[0])
        optimizer = optimizer_over(model)
        losses = losses_of(model, *batch())
        losses.mean().backward()
        self.unchanged(
            model,
            lambda: optimizer.step(losses=losses),
            RuntimeError,
            r"shape \(3,\).*no\s+grad_sample",
        )
