"""Each finding by a training that really fails so, and none by trainings that do not.

The trainings fail by how they are made, and by far: no finding is a matter of the seed, and so none
is of a processor's rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from monitored_runs import majority_and_minority, mlp, train
from torch import Tensor, nn

from irw_optim import DBSCANFilter
from irw_optim.monitor import Finding, IRWMonitor
from irw_optim.monitor.rows import blocks
from irw_optim.monitor.signatures import SIGNATURES

BALANCED: dict[str, Any] = {"class_balance": True}


def found(monitor: IRWMonitor) -> dict[str, Finding]:
    return {finding.name: finding for finding in monitor.diagnose()}


def drawn(probability: float, size: int = 1000) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(5)) < probability


def flipped() -> tuple[Tensor, Tensor, Tensor]:
    """A fifth of the labels are wrong."""
    x, y, group = majority_and_minority()
    return x, torch.where(drawn(0.2), 1 - y, y), group


def heavy_tails() -> tuple[Tensor, Tensor, Tensor]:
    """Targets of a regression, some of them a thousand times as far out as others."""
    x, _, group = majority_and_minority()
    z = torch.randn(len(x), generator=torch.Generator().manual_seed(5))
    return x, x[:, 0] * (3 * z).exp(), group


def a_far_minority() -> tuple[Tensor, Tensor, Tensor]:
    """Group 1 lies far from everybody, itself included, and its labels are the other way round."""
    x, _, group = majority_and_minority()
    y = (x[:, 0] + x[:, 1] > 0) ^ (group == 1)
    x[:, 2] = 0  # nothing tells the groups apart but the length
    return torch.where(group[:, None] == 1, 30 * x, x), y.long(), group


def a_rare_class() -> tuple[Tensor, Tensor, Tensor]:
    """A third class, each of whose members lies far from all others."""
    x, y, group = majority_and_minority()
    rare = drawn(0.04)
    return torch.where(rare[:, None], 40 * x, x), torch.where(rare, 2, y), group


def undecided(classes: int) -> nn.Sequential:
    """A network whose logits are all 0 at first."""
    model = mlp(classes=classes)
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    return model


class OneOutput(nn.Module):
    """A regression, or with a factor a probability, whose gradient is 0 where it is 0 or 1."""

    def __init__(self, factor: float | None = None, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = mlp(classes=1) if net is None else net
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x).squeeze(1)
        return output if self.factor is None else (self.factor * output).sigmoid()


class Hardening(nn.Module):
    """Ever surer of what one feature says, as a network that saturates is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(1)), 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.factor += 0.3
        return (self.factor * self.weight * x[:, 0].sign()).sigmoid()


def deep(activation: type[nn.Module]) -> nn.Module:
    """Three hidden layers, one output."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(16, 16), activation())]
    return nn.Sequential(nn.Linear(3, 16), activation(), *hidden, nn.Linear(16, 1))


@cache
def a_fixed_radius() -> IRWMonitor:
    return train(a_far_minority(), outliers=DBSCANFilter(eps=3.0), **BALANCED)


@cache
def global_weights_held_for_long() -> IRWMonitor:
    """Never renewed: those in S are all that is learned, and are the worst off no longer."""
    return train(epochs=20, scheme={"refresh": 20}, weighting="cvar")


HEALTHY: dict[str, dict[str, Any]] = {
    "class balance": {**BALANCED},
    "long": {**BALANCED, "epochs": 30, "mix": 0.25},
    "warm-up and centring": {**BALANCED, "center": 1.0, "warmup_steps": 60},
    "mix": {**BALANCED, "mix": 0.5},
    "CVaR": {"weighting": "cvar"},
    "plain": {"weighting": "uniform"},
    "global, renewed often": {**BALANCED, "scheme": {"refresh": 2, "unit": "steps"}, "epochs": 5},
    "resampling": {"scheme": {"refresh": 2, "use": "resampling"}},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_has_no_finding(name: str) -> None:
    monitor = train(**HEALTHY[name])
    assert [str(finding) for finding in monitor.diagnose()] == []
    first, *_, last = monitor.rows()
    assert last["worst_alpha_loss"] < 0.8 * first["worst_alpha_loss"], "it is healthy"


def test_the_worst_off_loss_rises_with_a_learning_rate_that_is_too_large() -> None:
    """A quadratic, whose steepest descent diverges beyond a learning rate."""
    x, _, group = majority_and_minority()
    x = x.double()
    monitor = train(
        (x, 2 * x[:, 0] - x[:, 1], group),
        model=OneOutput(net=nn.Linear(3, 1).double()),
        criterion=nn.MSELoss(),
        lr=0.8,
        epochs=1,
    )
    finding = found(monitor)["worst_off_loss_rises"]
    assert finding.figures["now"] > 100 * finding.figures["lowest"]
    assert "learning rate" in finding.advice


def test_the_worst_off_loss_rises_with_wrong_labels_and_plain_training() -> None:
    findings = found(train(flipped(), epochs=20, weighting="uniform"))
    assert "worst_off_loss_rises" in findings


def test_the_worst_off_loss_plateaus_where_nothing_can_be_learned() -> None:
    """Labels by a coin, and a model that begins where it can do no better."""
    x, _, group = majority_and_minority()
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    coin = drawn(0.5).long()
    monitor = train((x, coin, group), model=model, lr=0.005, **BALANCED)
    finding = found(monitor)["worst_off_loss_plateaus"]
    assert finding.figures["now"] == pytest.approx(finding.figures["start"], rel=0.08)


def test_the_paper_s_rule_leans_on_one_class_and_class_balance_mends_it() -> None:
    finding = found(train())["weight_on_one_class"]
    assert finding.figures["weight"] > 0.9
    assert finding.figures["samples"] < 0.7
    assert "class_balance" in finding.advice  # what it does is in HEALTHY


def test_a_few_samples_with_enormous_gradients() -> None:
    monitor = train(heavy_tails(), model=OneOutput(), criterion=nn.MSELoss(), lr=1e-7)
    finding = found(monitor)["weight_on_few_samples"]
    assert finding.figures["largest_weight"] > 0.5 or finding.figures["effective_samples"] < 5


def test_a_batch_whose_worst_off_are_two() -> None:
    monitor = train(batch=6, epochs=3, **BALANCED)
    assert found(monitor)["few_worst_off"].figures["worst_off_samples"] == 2


@pytest.mark.parametrize(("factor", "lr"), [(1e4, 0.1), (1.0, 1e3)], ids=["at once", "in training"])
def test_gradients_that_are_zero(factor: float, lr: float) -> None:
    x, y, group = majority_and_minority()
    monitor = train(
        (x, y.float(), group), model=OneOutput(factor), criterion=nn.MSELoss(), lr=lr, epochs=8
    )
    figures = found(monitor)["gradients_vanished"].figures
    assert figures["fallback"] > 0.8
    assert figures["norm_now"] <= 1e-3 * figures["norm_at_first"]


SATURATES = {
    "a sigmoid under a squared error": (Hardening, nn.MSELoss, {"lr": 1e-3}),
    "rectifiers that die": (
        lambda: OneOutput(net=deep(nn.ReLU)),
        nn.BCEWithLogitsLoss,
        {"lr": 0.3, "epochs": 16, **BALANCED},
    ),
}


@pytest.mark.parametrize("name", SATURATES)
def test_gradients_that_fade_and_are_never_zero(name: str) -> None:
    """Every step has positive scores: the norm of the gradient alone shows it."""
    model, criterion, options = SATURATES[name]
    x, y, group = majority_and_minority()
    data = (x.double(), y.double(), group)
    monitor = train(data, model=model().double(), criterion=criterion(), **options)
    figures = found(monitor)["gradients_vanished"].figures
    assert figures["fallback"] == 0
    assert 0 < figures["norm_now"] < 1e-3 * figures["norm_at_first"]


@pytest.mark.parametrize(("activation", "lr"), [(nn.Sigmoid, 0.3), (nn.ReLU, 0.02)])
def test_the_same_networks_as_the_advice_has_them(activation: type[nn.Module], lr: float) -> None:
    """A criterion on logits for the sigmoids, a smaller learning rate for the rectifiers."""
    x, y, group = majority_and_minority()
    monitor = train(
        (x, y.float(), group),
        model=OneOutput(net=deep(activation)),
        criterion=nn.BCEWithLogitsLoss(),
        lr=lr,
        epochs=16,
        **BALANCED,
    )
    losses = [row["worst_alpha_loss"] for row in monitor.rows()]
    assert min(losses[-20:]) < 0.7 * losses[0], "it learns"
    assert "gradients_vanished" not in found(monitor)


def test_gradients_that_fade_because_all_is_learned_have_no_finding() -> None:
    x, _, group = majority_and_minority()
    x = x.double()
    monitor = train(
        (x, 2 * x[:, 0] - x[:, 1], group),
        model=OneOutput(net=nn.Linear(3, 1).double()),
        criterion=nn.MSELoss(),
        epochs=20,
    )
    first, *_, last = (row["gradient_norm"] for row in monitor.rows())
    assert 0 < last < 1e-5 * first
    assert found(monitor) == {}


def test_global_weights_that_leave_batches_without_any() -> None:
    monitor = train(batch=3, epochs=2, scheme={"refresh": 1}, weighting="cvar", alpha=0.1)
    assert found(monitor)["batches_without_weight"].figures["fallback"] > 0.5


def test_a_fixed_radius_removes_many() -> None:
    assert found(a_fixed_radius())["filter_removes_many"].figures["removed"] > 0.1


def test_the_filter_removes_the_minority() -> None:
    monitor = train(a_far_minority(), outliers=DBSCANFilter(), lr=1e-4, **BALANCED)
    finding = found(monitor)["filter_removes_one_group"]
    assert "group 1" in finding.says
    assert finding.figures["rate"] > 3 * finding.figures["rate_of_others"]


def test_the_filter_removes_a_rare_class() -> None:
    monitor = train(
        a_rare_class(), model=undecided(3), outliers=DBSCANFilter(eps=3.0), lr=1e-5, **BALANCED
    )
    finding = found(monitor)["filter_removes_one_class"]
    assert "class 2" in finding.says
    assert finding.figures["rate"] > 0.5


def test_the_worst_group_has_less_than_its_share() -> None:
    """Here because the filter took it for noise."""
    finding = found(a_fixed_radius())["worst_group_underweighted"]
    assert "group 1" in finding.says
    assert finding.figures["weight"] < 0.8 * finding.figures["samples"]


def test_without_groups_nothing_is_said_about_them() -> None:
    filter_ = DBSCANFilter(eps=3.0)
    monitor = train(a_far_minority(), outliers=filter_, tell_groups=False, **BALANCED)
    assert not [name for name in found(monitor) if "group" in name]
    assert "filter_removes_many" in found(monitor)


def test_global_weights_held_for_long_are_stale() -> None:
    finding = found(global_weights_held_for_long())["stale_weights"]
    assert finding.figures["agreement"] < 0.5
    assert finding.figures["held_for"] > 50


def test_before_enough_rows_that_is_what_is_said() -> None:
    (finding,) = train(epochs=1, monitor={"every": 5}).diagnose()
    assert finding.name == "too_few_records"
    (finding,) = train(epochs=2, warmup_steps=30, **BALANCED).diagnose()
    assert (finding.name, finding.figures["rows"]) == ("too_few_records", 10)


def test_a_finding_reads_as_a_sentence_and_what_to_do() -> None:
    for finding in global_weights_held_for_long().diagnose():
        first, second = str(finding).split("\n")
        assert first.startswith(finding.name + ": ")
        assert second.startswith("  What to change: ")
        assert first.endswith(".")
        assert second.endswith(".")


def test_every_signature_says_what_it_is() -> None:
    assert all(signature.__doc__ for signature in SIGNATURES)


def test_the_error_of_a_block_is_that_of_the_scatter_inside() -> None:
    means, error = blocks(np.array([1.0, 3.0, 1.0, 3.0]), 2)
    assert (means.tolist(), error) == ([2.0, 2.0], 1.0)


def test_blocks_of_a_course_without_scatter_have_no_error() -> None:
    means, error = blocks(np.array([1.0, 1.0, 3.0, 3.0]), 2)
    assert means.tolist() == [1.0, 3.0]
    assert error == 0
