"""What cannot work is refused by name before anything changes."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import opacus
import pytest
import torch
import torch.nn.functional as F
from models import mlp
from torch import nn

from irw_optim import DBSCANFilter, IRWMonitor, IRWOptimizer, alpha, irw_weights, metrics, worst_off
from irw_optim.arguments import DPGuaranteeError
from irw_optim.privacy import IRWDPConfig, IRWDPOptimizer
from irw_optim.schemes import GlobalScheme, ResamplingSampler


class World:
    """A model, a criterion and an optimizer, with a momentum buffer and a gradient already."""

    def __init__(self) -> None:
        self.model = mlp(4, 5, 3, act=nn.ReLU)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.x, self.y = torch.randn(6, 4), torch.randint(3, (6,))
        self.criterion(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def losses(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def wrap(self, **options) -> IRWOptimizer:
        defaults = {"alpha": 0.3, "model": self.model, "criterion": self.criterion}
        return IRWOptimizer(options.pop("optimizer", self.optimizer), **{**defaults, **options})

    def snapshot(self) -> list[object]:
        """All that an error must leave alone."""
        modules = [*self.model.modules(), self.criterion]
        hooks = [len(v) for m in modules for k, v in vars(m).items() if "hooks" in k and v]
        tensors = [*self.model.state_dict().values()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [s["momentum_buffer"] for s in self.optimizer.state.values()]
        forward = self.criterion.__dict__.get("forward")
        return [hooks, forward, [t.tolist() for t in tensors]]


@pytest.fixture
def world() -> World:
    return World()


FOREIGN = nn.Linear(2, 2)
PRIVATE = opacus.optimizers.DPOptimizer(
    torch.optim.SGD(FOREIGN.parameters(), lr=0.1),
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    expected_batch_size=4,
)


class WithoutReduction(nn.Module):
    def forward(self, input, target):
        return (input - target).square().mean()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha=0\.0: expected a number in \(0, 1\]"),
        ({"alpha": 1.01}, ValueError, r"alpha=1\.01: expected"),
        ({"alpha": -1}, ValueError, r"alpha=-1: expected"),
        ({"alpha": math.nan}, ValueError, r"alpha=nan: expected"),
        ({"alpha": "0.2"}, TypeError, r"alpha='0\.2': expected"),
        ({"alpha": None}, TypeError, r"alpha=None: expected"),
        ({"alpha": True}, TypeError, r"alpha=True: expected"),
        ({"optimizer": None}, TypeError, r"optimizer=None: expected a torch optimizer"),
        (
            {"optimizer": torch.optim.SGD},
            TypeError,
            r"optimizer=.*SGD.*: expected a torch optimizer",
        ),
        ({"optimizer": PRIVATE}, DPGuaranteeError, r"DPOptimizer.*void its guarantee"),
        (
            {"optimizer": IRWOptimizer(torch.optim.SGD(FOREIGN.parameters(), lr=1), alpha=1)},
            TypeError,
            r"IRWOptimizer already: wrap the optimizer inside it",
        ),
        (
            {"optimizer": torch.optim.SGD(FOREIGN.parameters(), lr=0.1)},
            ValueError,
            r"2 parameters that are not the model's.*\(2, 2\)",
        ),
        ({"model": 3}, TypeError, r"model=3: expected the torch\.nn\.Module"),
        ({"model": None}, ValueError, r"criterion is given without model"),
        ({"criterion": F.cross_entropy}, TypeError, r"criterion=.*PerSampleLoss\(fn\)"),
        (
            {"criterion": nn.CrossEntropyLoss},
            TypeError,
            r"criterion=CrossEntropyLoss is a class: .*criterion=CrossEntropyLoss\(\)",
        ),
        (
            {"criterion": nn.CrossEntropyLoss(reduction="none")},
            ValueError,
            r"reduction='none'.*optimizer\.backward\(losses\)",
        ),
        ({"criterion": WithoutReduction()}, TypeError, r"no reduction to switch off"),
        ({"outliers": 0.5}, TypeError, r"outliers=0\.5: expected None or a filter"),
        ({"center": -0.1}, ValueError, r"center=-0\.1: expected a number in \[0, inf\)"),
        ({"center": math.nan}, ValueError, r"center=nan"),
        (
            {"center": 1.0, "weighting": "cvar"},
            ValueError,
            r"center=1\.0 belongs to weighting='irw'",
        ),
        ({"class_balance": 1}, TypeError, r"class_balance=1: expected True or False"),
        ({"mix": 2}, ValueError, r"mix=2: expected a number in \[0, 1\]"),
        ({"warmup_steps": -1}, ValueError, r"warmup_steps=-1: expected a whole number of steps, 0"),
        ({"warmup_steps": 0.5}, TypeError, r"warmup_steps=0\.5: expected a whole number"),
        ({"engine": "fast"}, ValueError, r"engine='fast': expected one of 'auto'"),
        ({"weighting": "dro"}, ValueError, r"weighting='dro': expected one of 'irw'"),
        ({"weighting": 1}, TypeError, r"weighting=1: expected a name or a callable"),
        (
            {"score_parameters": "first"},
            TypeError,
            r"score_parameters='first': expected None, 'last'",
        ),
        (
            {"score_parameters": nn.Linear(2, 2)},
            TypeError,
            r"score_parameters=Linear\(.*\): expected None, 'last'",
        ),
        ({"score_parameters": ["7"]}, ValueError, r"score_parameters names '7'.*it has 0\.weight"),
        ({"score_parameters": lambda n, p: False}, ValueError, r"chooses no trainable parameter"),
        (
            {"score_parameters": "last", "model": None, "criterion": None},
            ValueError,
            r"score_parameters='last' is given without model",
        ),
    ],
)
def test_impossible_arguments(world, options, kind, message):
    before = world.snapshot()
    with pytest.raises(kind, match=message):
        world.wrap(**options)
    assert world.snapshot() == before
    world.wrap()  # and the same objects are good for another try


NUMBERS_FROM_NUMPY = [
    ("alpha", np.float32(0.25)),
    ("alpha", np.float64(0.25)),
    ("alpha", np.array(0.25)),
    ("alpha", np.int64(1)),
    ("alpha", Fraction(1, 4)),
    ("center", np.float32(0.5)),
    ("mix", np.array(0.5, dtype=np.float16)),
    ("warmup_steps", np.int64(2)),
    ("warmup_steps", np.array(2)),
    ("accumulation_steps", np.uint8(2)),
    ("class_balance", np.True_),
    ("class_balance", np.array(False)),
]


@pytest.mark.parametrize(("name", "value"), NUMBERS_FROM_NUMPY, ids=repr)
def test_numbers_from_numpy_are_the_numbers_that_they_mean(world, name, value):
    optimizer = world.wrap(**{name: value})
    meant = optimizer.state_dict()["irw"][name]
    assert type(meant) in (bool, int, float)
    assert meant == value
    optimizer.detach()
    plain = world.wrap(**{name: meant})
    assert plain.scheme == optimizer.scheme
    assert plain.state_dict()["irw"] == optimizer.state_dict()["irw"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (3, r"state_dict\[.irw.\]=3: expected what state_dict\(\) returned"),
        ("x", r"state_dict\[.irw.\]='x': expected what"),
        ({}, r"state_dict\[.irw.\] has no 'steps': expected what"),
        ({"steps": "7"}, "steps='7': expected a whole number >= 0"),
        ({"steps": None}, "steps=None: expected a whole number >= 0"),
        ({"steps": -1}, "steps=-1: expected a whole number >= 0"),
    ],
    ids=str,
)
def test_a_wrong_checkpoint_is_refused_before_the_optimizer_inside_has_it(world, own, message):
    optimizer = world.wrap()
    state = {**optimizer.state_dict(), "irw": own}
    state["param_groups"] = [{**group, "lr": 77.0} for group in state["param_groups"]]
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.steps == 0
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_own_state(own)
    for state in (None, "x"):
        with pytest.raises(TypeError, match=f"state_dict={state!r}: expected what"):
            optimizer.load_state_dict(state)


def three(losses, gradients, worst_off):
    return losses[:3]


def a_column(losses, gradients, worst_off):
    return losses[:, None]


def their_mean(losses, gradients, worst_off):
    return losses.mean()


def a_mask(losses, gradients, worst_off):
    return losses > 0


def a_number(losses, gradients, worst_off):
    return 1.0


def nothing(losses, gradients, worst_off):
    return None


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (three, r"shape \(3,\)"),
        (a_column, r"shape \(6, 1\)"),
        (their_mean, r"shape \(\)"),
        (a_mask, "torch.bool"),
        (a_number, "float"),
        (nothing, "NoneType"),
    ],
    ids=["three", "column", "mean", "mask", "number", "nothing"],
)
def test_what_a_rule_returns_is_checked_by_name(world, rule, told):
    optimizer = world.wrap(weighting=rule)
    before = world.snapshot()
    loss = world.criterion(world.model(world.x), world.y)
    told = rf"weighting returned {told}: expected scores.* of shape \(6,\)"
    with pytest.raises((TypeError, ValueError), match=told):
        loss.backward()
    assert world.snapshot() == before
    assert optimizer.steps == 0


NOT_NUMBERS = [
    {"alpha": np.True_},
    {"alpha": np.array([0.3])},
    {"alpha": np.float32("nan")},
    {"alpha": torch.tensor(0.3)},
    {"alpha": 0.3 + 0j},
    {"alpha": 10**400},
    {"center": np.False_},
    {"mix": np.float64("nan")},
    {"warmup_steps": np.float64(2)},
    {"warmup_steps": np.True_},
    {"accumulation_steps": np.float32(2)},
    {"accumulation_steps": np.int64(0)},
    {"class_balance": np.int64(1)},
]


@pytest.mark.parametrize("options", NOT_NUMBERS, ids=repr)
def test_what_is_no_such_number_is_refused(world, options):
    (name,) = options
    before = world.snapshot()
    with pytest.raises((TypeError, ValueError), match=f"{name}=.*: expected"):
        world.wrap(**options)
    assert world.snapshot() == before


ELSEWHERE = {
    "min_samples": (lambda v: DBSCANFilter(min_samples=v), 3, "whole"),
    "eps": (lambda v: DBSCANFilter(eps=v), 0.5, "real"),
    "quantile": (lambda v: DBSCANFilter(quantile=v), 0.5, "real"),
    "alpha of irw_weights": (
        lambda v: irw_weights(torch.ones(4), torch.ones(4, 2), v),
        0.5,
        "real",
    ),
    "alpha of worst_off": (lambda v: worst_off(torch.ones(4), v), 0.5, "real"),
    "alpha of the metric": (lambda v: metrics.worst_alpha_loss([1.0, 2.0], v), 0.5, "real"),
    "refresh": (lambda v: global_scheme(refresh=v), 2, "whole"),
    "batch_size": (lambda v: global_scheme(batch_size=v), 2, "whole"),
    "outlier_block": (lambda v: global_scheme(outlier_block=v), 2, "whole"),
    "num_samples": (lambda v: ResamplingSampler(torch.ones(4), num_samples=v), 2, "whole"),
    "num_groups": (lambda v: alpha.privacy_of(0.5, v), 2, "whole"),
    "truth_probability": (lambda v: alpha.privacy_of(v, 2), 0.5, "real"),
    "IRWDPConfig": (lambda v: IRWDPConfig(init_threshold=v), 0.5, "real"),
    "warmup_steps of IRWDPConfig": (
        lambda v: IRWDPConfig(init_threshold=0.5, warmup_steps=v),
        2,
        "whole",
    ),
    "noise_multiplier": (lambda v: private(noise_multiplier=v), 0.5, "real"),
    "max_grad_norm": (lambda v: private(max_grad_norm=v), 0.5, "real"),
    "expected_batch_size": (lambda v: private(expected_batch_size=v), 4, "real"),
    "every": (lambda v: monitor(every=v), 2, "whole"),
    "capacity": (lambda v: monitor(capacity=v), 20, "whole"),
}


def global_scheme(**options) -> GlobalScheme:
    model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=0.3, model=model, criterion=criterion)
    data = torch.utils.data.TensorDataset(torch.randn(6, 2), torch.randint(0, 2, (6,)))
    return GlobalScheme(optimizer, torch.utils.data.DataLoader(data, batch_size=3), **options)


def private(**options) -> IRWDPOptimizer:
    defaults = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 4}
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    return IRWDPOptimizer(inner, irw=IRWDPConfig(init_threshold=0.7), **{**defaults, **options})


def monitor(**options) -> IRWMonitor:
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    return IRWMonitor(IRWOptimizer(inner, alpha=0.3), **options)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_numbers_are_the_same_everywhere(name):
    make, value, kind = ELSEWHERE[name]
    kinds = [np.int64, np.int32] if kind == "whole" else [np.float32, np.float64]
    for number in [value, *[kind(value) for kind in kinds], np.array(value)]:
        made = make(number)
        if dataclasses.is_dataclass(made):
            assert all(
                type(v) in (bool, int, float, str) for v in dataclasses.asdict(made).values()
            )
            assert made == make(value)
    wrong = [np.True_, True, torch.tensor(value), np.array([value]), np.float64("nan"), "1"]
    wrong += [np.float64(value)] if kind == "whole" else []
    for number in wrong:
        with pytest.raises((TypeError, ValueError, NotImplementedError), match="expected"):
            make(number)


def test_unknown_arguments(world):
    with pytest.raises(TypeError, match="lambd"):
        world.wrap(lambd=0.5)
    with pytest.raises(TypeError, match="alpha"):
        IRWOptimizer(world.optimizer)


def test_a_criterion_already_attached(world):
    first = world.wrap()
    before = world.snapshot()
    other = torch.nn.Linear(4, 3)
    inner = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"CrossEntropyLoss\(\) is attached.*detach\(\)"):
        IRWOptimizer(inner, alpha=0.3, model=other, criterion=first.criterion)
    assert world.snapshot() == before
    first.detach()
    world.wrap()


@pytest.mark.parametrize(
    ("losses", "kind", "message"),
    [
        (lambda w: w.losses().mean(), ValueError, r"losses has shape \(\): expected \(B,\)"),
        (lambda w: w.losses()[:, None], ValueError, r"losses has shape \(6, 1\): expected \(B,\)"),
        (lambda w: w.losses().tolist(), TypeError, r"losses=\[.*expected a tensor of shape \(B,\)"),
        (lambda w: w.losses().detach(), RuntimeError, r"losses do not require a gradient"),
        (lambda w: torch.arange(6), TypeError, r"losses has dtype torch\.int64"),
        (lambda w: None, TypeError, r"losses=None"),
    ],
)
def test_losses_that_are_none(world, losses, kind, message):
    optimizer = world.wrap(criterion=None)
    before = world.snapshot()
    with pytest.raises(kind, match=message):
        optimizer.backward(losses(world))
    assert world.snapshot() == before
    assert optimizer.last_step is None


def test_losses_that_do_not_come_from_the_model(world):
    optimizer = world.wrap(criterion=None)
    before = world.snapshot()
    with pytest.raises(RuntimeError, match=r"do not depend on any parameter that makes the scores"):
        optimizer.backward(torch.rand(6, requires_grad=True) * 2)
    assert world.snapshot() == before


def test_class_balance_without_labels(world):
    optimizer = world.wrap(criterion=None, class_balance=True)
    before = world.snapshot()
    with pytest.raises(ValueError, match=r"class_balance=True needs one class label a sample"):
        optimizer.backward(world.losses())
    assert world.snapshot() == before


@pytest.mark.parametrize("labels", [torch.zeros(5).long(), torch.zeros(6, 2).long(), [0] * 6])
@pytest.mark.parametrize("needed", [True, False])
def test_labels_that_do_not_fit(world, labels, needed):
    optimizer = world.wrap(criterion=None, class_balance=needed)
    before = world.snapshot()
    with pytest.raises((TypeError, ValueError), match="labels"):
        optimizer.backward(world.losses(), labels=labels)
    assert world.snapshot() == before


def test_a_last_batch_of_one_that_was_squeezed(world):
    optimizer = world.wrap()
    optimizer.zero_grad()
    loss = world.criterion(world.model(world.x[0]), world.y[0])
    plain = torch.nn.functional.cross_entropy(world.model(world.x[0]), world.y[0])
    assert loss.item() == plain.item()
    truth = torch.autograd.grad(plain, list(world.model.parameters()))
    loss.backward()
    assert optimizer.last_step.weights.tolist() == [1.0]
    for p, gradient in zip(world.model.parameters(), truth, strict=True):
        assert torch.allclose(p.grad, gradient)


class TestStep:
    def test_before_backward(self, world):
        optimizer = world.wrap()
        optimizer.zero_grad()
        before = world.snapshot()
        with pytest.raises(RuntimeError, match=r"step\(\).*backward"):
            optimizer.step()
        assert world.snapshot() == before

    def test_on_a_gradient_that_nobody_weighed(self, world):
        optimizer = world.wrap()
        optimizer.zero_grad()
        world.losses().mean().backward()
        before = world.snapshot()
        with pytest.raises(RuntimeError, match=r"without weights.*criterion\(model\(x\), y\)"):
            optimizer.step()
        assert world.snapshot() == before

    def test_twice_on_one_backward(self, world):
        optimizer = world.wrap()
        optimizer.zero_grad()
        world.criterion(world.model(world.x), world.y).backward()
        optimizer.step()
        before = world.snapshot()
        with pytest.raises(RuntimeError, match=r"without weights"):
            optimizer.step()
        assert world.snapshot() == before

    def test_with_losses_but_without_grad_sample(self, world):
        optimizer = world.wrap(model=None, criterion=None)
        optimizer.zero_grad()
        losses = world.losses()
        losses.mean().backward()
        before = world.snapshot()
        with pytest.raises(RuntimeError, match=r"no grad_sample.*|no parameter has a grad_sample"):
            optimizer.step(losses=losses)
        assert world.snapshot() == before

    def test_inside_opacus(self, world):
        optimizer = world.wrap()
        optimizer.zero_grad()
        world.criterion(world.model(world.x), world.y).backward()
        world.model[0].weight.summed_grad = torch.zeros(5, 4)
        before = world.snapshot()
        with pytest.raises(DPGuaranteeError, match=r"summed_grad.*IRWPrivacyEngine"):
            optimizer.step()
        assert world.snapshot() == before


class TestNonFinite:
    """A sample that is not finite raises at the step, naming it; parameters are as they were."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "options", [{}, {"outliers": lambda gram: gram.diagonal() < 0}], ids=["plain", "a filter"]
    )
    def test_losses(self, world, value, options):
        optimizer = world.wrap(**options)
        optimizer.zero_grad()
        world.x[[1, 4]] = value
        world.criterion(world.model(world.x), world.y).backward()
        before = [p.tolist() for p in world.model.parameters()]
        with pytest.raises(
            FloatingPointError, match=r"2 samples.*indices 1, 4.*nothing was updated"
        ):
            optimizer.step()
        assert [p.tolist() for p in world.model.parameters()] == before

    def test_gradients_alone(self, world):
        optimizer = world.wrap(criterion=None)
        optimizer.zero_grad()
        # sqrt at 0 has a finite value, and an infinite gradient
        optimizer.backward(
            world.losses() + F.pad(world.model(world.x[:1]).mul(0)[:, 0].sqrt(), (0, 5))
        )
        before = [p.tolist() for p in world.model.parameters()]
        with pytest.raises(FloatingPointError, match=r"nothing was updated"):
            optimizer.step()
        assert [p.tolist() for p in world.model.parameters()] == before

    @pytest.mark.parametrize("weighting", ["cvar", "uniform"])
    def test_other_weightings(self, world, weighting):
        optimizer = world.wrap(weighting=weighting)
        optimizer.zero_grad()
        world.x[2] = math.nan
        world.criterion(world.model(world.x), world.y).backward()
        with pytest.raises(FloatingPointError, match=r"1 samples.*indices 2"):
            optimizer.step()

    def test_warm_up(self, world):
        optimizer = world.wrap(warmup_steps=2)
        optimizer.zero_grad()
        world.x[2] = math.nan
        world.criterion(world.model(world.x), world.y).backward()
        with pytest.raises(FloatingPointError, match=r"indices 2"):
            optimizer.step()

    def test_training_goes_on_after_a_broken_batch(self, world):
        optimizer = world.wrap()
        good = world.x.clone()
        world.x[0] = math.nan
        world.criterion(world.model(world.x), world.y).backward()
        with pytest.raises(FloatingPointError):
            optimizer.step()
        optimizer.zero_grad()
        world.criterion(world.model(good), world.y).backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in world.model.parameters())

    def test_a_gradient_scaler_skips_instead(self, world):
        optimizer = world.wrap()
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        world.x[0] = math.inf
        scaler.scale(world.criterion(world.model(world.x), world.y)).backward()
        before = [p.tolist() for p in world.model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert [p.tolist() for p in world.model.parameters()] == before
