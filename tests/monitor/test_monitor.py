"""The monitor on real optimizers: it hears every step, changes nothing, and comes back."""

from __future__ import annotations

import copy
import io
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from monitored_runs import majority_and_minority, mlp, train
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from irw_optim import DBSCANFilter, IRWMonitor, IRWOptimizer
from irw_optim.schemes import GlobalScheme

X, Y, GROUPS = majority_and_minority(80)
BATCHES = list(zip(X.split(16), Y.split(16), GROUPS.split(16), strict=True))


def setting(**options: Any) -> tuple[nn.Module, nn.Module, IRWOptimizer]:
    model, criterion = options.pop("model", None) or mlp(), options.pop("criterion", None)
    criterion = criterion or nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        **{"alpha": 0.3, "model": model, "criterion": criterion, **options},
    )
    return model, criterion, optimizer


def step_on(batch: Any, model: nn.Module, criterion: nn.Module, optimizer: IRWOptimizer) -> None:
    x, y, _ = batch
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def test_every_row_is_the_record_of_its_step() -> None:
    model, criterion, optimizer = setting(outliers=DBSCANFilter(quantile=0.8))
    monitor = IRWMonitor(optimizer)
    for number, (x, y, groups) in enumerate(BATCHES, start=1):
        monitor.groups(groups)
        step_on((x, y, groups), model, criterion, optimizer)
        record, row = optimizer.last_step, monitor.rows()[-1]
        assert record is not None
        assert len(monitor) == row["step"] == number
        assert row["effective_samples"] == pytest.approx(record.effective_sample_size, rel=1e-5)
        assert row["mean_loss"] == pytest.approx(float(record.losses.mean()), rel=1e-5)
        assert row["removed_share"] == pytest.approx(float(record.outliers.float().mean()))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        for part in groups.unique().tolist():
            of_group = float(record.weights[groups == part].sum())
            assert row[f"weight/group_{part}"] == pytest.approx(of_group, abs=1e-6)
            of_class = float(record.worst_off[y == part].float().sum() / record.worst_off.sum())
            assert row[f"worst_off/class_{part}"] == pytest.approx(of_class, abs=1e-6)


def test_the_training_is_bit_for_bit_the_same_with_it_and_without() -> None:
    trained = []
    for listens in (True, False):
        model, criterion, optimizer = setting(class_balance=True, outliers=DBSCANFilter())
        if listens:
            monitor = IRWMonitor(optimizer)
        for batch in BATCHES:
            if listens:
                monitor.groups(batch[2])
            step_on(batch, model, criterion, optimizer)
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *trained))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", [False, True])
def test_steps_that_are_not_recorded_touch_no_tensor(scheme: bool) -> None:
    """And so never wait for a device."""
    model, criterion, optimizer = setting()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16)
    batches: Any = GlobalScheme(optimizer, loader, refresh=100) if scheme else loader
    operations, counts = Operations(), []
    optimizer.register_step_post_hook(lambda *_: operations.__enter__())
    monitor = IRWMonitor(optimizer, every=3)
    optimizer.register_step_post_hook(lambda *_: operations.__exit__(None, None, None))
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        monitor.groups(GROUPS[:16])
        optimizer.step()
        counts.append(operations.count)
        operations.count = 0
    assert [count > 0 for count in counts] == [True, False, True, False, False]


def test_the_warm_up_is_marked() -> None:
    model, criterion, optimizer = setting(warmup_steps=2)
    monitor = IRWMonitor(optimizer)
    for batch in BATCHES[:4]:
        step_on(batch, model, criterion, optimizer)
    rows = monitor.rows()
    assert [row["weighted"] for row in rows] == [0.0, 0.0, 1.0, 1.0]
    assert [row["worst_off_samples"] for row in rows] == [0.0, 0.0, 5.0, 5.0]
    assert rows[0]["effective_share"] == pytest.approx(1.0)
    assert rows[0]["worst_alpha_loss"] > rows[0]["mean_loss"], "known without S, too"


def test_targets_that_are_ignored_are_nobodys() -> None:
    model, criterion, optimizer = setting(criterion=nn.CrossEntropyLoss(ignore_index=1))
    monitor = IRWMonitor(optimizer)
    x, y, groups = BATCHES[0]
    monitor.groups(groups)
    step_on((x, y, groups), model, criterion, optimizer)
    (row,) = monitor.rows()
    assert row["samples"] == int((y == 0).sum())
    assert row["samples/class_0"] == 1.0
    assert "samples/class_1" not in row
    assert row["mean_loss"] == pytest.approx(
        float(optimizer.last_step.losses[y == 0].mean()), rel=1e-5
    )
    assert row["samples/group_1"] == pytest.approx(float(groups[y == 0].float().mean()))


@pytest.mark.parametrize("options", [{}, {"accumulation_steps": 2}, {"warmup_steps": 1}])
def test_sequences_without_a_target_are_nobodys(options: dict[str, Any]) -> None:
    embedded = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))
    model, criterion, optimizer = setting(model=embedded, **options)
    monitor, targets = IRWMonitor(optimizer), torch.randint(7, (8, 4))
    targets[2:] = -100
    targets[1, 1:] = -100
    loss = criterion(model(torch.randint(7, (8, 4))).transpose(1, 2), targets)
    loss.backward()
    optimizer.step()
    (row,) = monitor.rows()
    assert row["samples"] == 2
    assert row["mean_loss"] == pytest.approx(float(optimizer.last_step.losses[:2].mean()))
    assert row["zero_share"] <= 0.5


def test_a_batch_on_which_nobody_counts_has_no_row() -> None:
    model, criterion, optimizer = setting(criterion=nn.CrossEntropyLoss(ignore_index=-100))
    monitor = IRWMonitor(optimizer)
    x, y, groups = BATCHES[0]
    step_on((x, torch.full_like(y, -100), groups), model, criterion, optimizer)
    assert len(monitor) == 0


def test_regression_has_no_classes() -> None:
    model, criterion = mlp(classes=1), nn.MSELoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model, criterion=criterion
    )
    monitor = IRWMonitor(optimizer)
    criterion(model(X), Y.float().unsqueeze(1)).backward()
    optimizer.step()
    assert not any("class" in name for name in monitor.rows()[0])


@pytest.mark.parametrize("k", [1, 2])
def test_accumulated_batches(k: int) -> None:
    """The newest batch by default, the logical one with accumulation_steps."""
    model, criterion, optimizer = setting(accumulation_steps=k)
    monitor = IRWMonitor(optimizer)
    for first, second in ((0, 1), (2, 3)):
        optimizer.zero_grad()
        for x, y, groups in (BATCHES[first], BATCHES[second]):
            (criterion(model(x), y) / 2).backward()
            monitor.groups(groups)
        optimizer.step()
    groups = torch.cat([BATCHES[i][2] for i in ((2, 3) if k == 2 else (3,))])
    row = monitor.rows()[-1]
    assert (row["step"], row["samples"]) == (2, 16 * k)
    assert row["samples/group_1"] == pytest.approx(float(groups.float().mean()))


def test_a_short_logical_batch() -> None:
    model, criterion, optimizer = setting(accumulation_steps=3)
    monitor = IRWMonitor(optimizer)
    x, y, groups = BATCHES[0]
    criterion(model(x), y).backward()
    monitor.groups(groups)
    optimizer.step()
    assert monitor.rows()[0]["samples/group_1"] == pytest.approx(float(groups.float().mean()))


def test_a_closure() -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.LBFGS(model.parameters(), max_iter=3),
        alpha=0.3,
        model=model,
        criterion=criterion,
    )
    monitor = IRWMonitor(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = criterion(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert [row["step"] for row in monitor.rows()] == [1, 2]


def test_losses_and_grad_samples() -> None:
    """The second and the third way in."""
    from opacus import GradSampleModule

    model = mlp()
    optimizer = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model)
    monitor = IRWMonitor(optimizer)
    optimizer.backward(F.cross_entropy(model(X), Y, reduction="none"), labels=Y)
    optimizer.step()
    assert "weight/class_1" in monitor.rows()[0]

    wrapped = GradSampleModule(mlp())
    optimizer = IRWOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), alpha=0.3)
    monitor = IRWMonitor(optimizer)
    losses = F.cross_entropy(wrapped(X), Y, reduction="none")
    losses.mean().backward()
    optimizer.step(losses=losses)
    assert monitor.rows()[0]["gradient_norm"] > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_no_step(fused: bool) -> None:
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, fused=fused),
        alpha=0.3,
        model=model,
        criterion=criterion,
    )
    monitor, scaler = IRWMonitor(optimizer), torch.amp.GradScaler("cpu", init_scale=4.0)
    for number, (x, y, groups) in enumerate(BATCHES[:3]):
        monitor.groups(groups)
        x = x * float("inf") if number == 1 else x
        optimizer.zero_grad()
        scaler.scale(criterion(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    rows = monitor.rows()
    assert [row["step"] for row in rows] == [1, 2]
    groups = BATCHES[2][2]
    assert rows[1]["samples/group_1"] == pytest.approx(float(groups.float().mean()))


def test_the_age_of_held_weights() -> None:
    monitor = train(epochs=2, scheme={"refresh": 15, "unit": "steps"}, warmup_steps=5)
    ages = [row["held_for"] for row in monitor.rows()]
    assert all(age != age for age in ages[:5]), "none are held in the warm-up"
    assert ages[5:] == [step % 15 for step in range(len(ages) - 5)]
    fresh = [row["held_agreement"] for row in monitor.rows()[5::15]]
    assert min(fresh) > 0.95


def test_a_record_of_several_processes_has_the_groups_of_this_one() -> None:
    model, criterion, optimizer = setting()
    monitor = IRWMonitor(optimizer)
    x, y, groups = BATCHES[0]
    criterion(model(x), y).backward()
    record, own = optimizer.last_step, torch.arange(16) >= 10
    object.__setattr__(record, "own", own)
    monitor.groups(groups[own])
    optimizer.step()
    (row,) = monitor.rows()
    assert row["samples"] == 16
    assert row["samples/group_1"] == pytest.approx(float(groups[own].float().mean()))


def test_groups_of_another_batch_are_refused_before_the_step() -> None:
    model, criterion, optimizer = setting()
    monitor, before = IRWMonitor(optimizer), [p.clone() for p in model.parameters()]
    monitor.groups([0, 1])
    with pytest.raises(
        ValueError, match=r"a batch of 16 samples, but monitor.groups\(\) was given 2"
    ):
        step_on(BATCHES[0], model, criterion, optimizer)
    assert optimizer.steps == 0
    assert all(map(torch.equal, model.parameters(), before))
    step_on(BATCHES[1], model, criterion, optimizer)
    assert [row["step"] for row in monitor.rows()] == [1]


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (None, "groups has shape"),
        ([0] * 15 + [math.nan], "groups has no value for 1 of 16 samples"),
        ({}, "groups has no column"),
        ({"a": [0] * 16, "b": [0] * 15}, "16 samples and groups.* has 15"),
    ],
)
def test_what_are_no_groups_is_refused_where_they_are_told(groups: Any, match: str) -> None:
    model, criterion, optimizer = setting()
    monitor = IRWMonitor(optimizer)
    with pytest.raises(ValueError, match=match):
        monitor.groups(groups)
    step_on(BATCHES[0], model, criterion, optimizer)
    assert [row["step"] for row in monitor.rows()] == [1]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every": 0}, ValueError, "every=0: expected a whole number >= 1"),
        ({"every": 1.5}, TypeError, "every=1.5"),
        ({"every": True}, TypeError, "every=True"),
        ({"capacity": 9}, ValueError, "capacity=9: expected a whole number >= 10"),
    ],
)
def test_arguments_that_are_impossible(options: Any, error: Any, match: str) -> None:
    _, _, optimizer = setting()
    with pytest.raises(error, match=match):
        IRWMonitor(optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks


DATES = np.array(["2020-01-01", "2021-01-01"], "datetime64[s]")[GROUPS[:16].tolist()]
OBJECTS: dict[str, Any] = {
    "dates": DATES,
    "decimals": [Decimal(int(g)) / 2 for g in GROUPS[:16]],
    "fractions beside dates": {"f": [Fraction(1, 3)] * 16, "d": DATES},
    "truth values": GROUPS[:16] == 1,
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_state_is_plain_data_whatever_the_groups_are(kind: str) -> None:
    model, criterion, optimizer = setting()
    monitor, file = IRWMonitor(optimizer), io.BytesIO()
    monitor.groups(OBJECTS[kind])
    step_on(BATCHES[0], model, criterion, optimizer)
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    again = IRWMonitor(optimizer)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert str(again.rows()) == str(monitor.rows())  # NaN is not NaN
    assert sum("weight/group" in name for name in again.rows()[0]) == 2


def test_groups_whose_values_have_a_comma() -> None:
    model, criterion, optimizer = setting()
    monitor = IRWMonitor(optimizer)
    monitor.groups({"a": ["x,y"] * 4 + ["x"] * 12, "b": ["z"] * 4 + ["y,z"] * 12})
    step_on(BATCHES[0], model, criterion, optimizer)
    row = monitor.rows()[0]
    assert (row[r"samples/group_x\,y,z"], row[r"samples/group_x,y\,z"]) == (0.25, 0.75)


def test_what_is_no_irw_optimizer() -> None:
    with pytest.raises(TypeError, match="expected the IRWOptimizer that trains"):
        IRWMonitor(torch.optim.SGD(mlp().parameters(), lr=0.1))


def test_an_optimizer_that_a_framework_prepared() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, criterion, optimizer = setting()
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    monitor = IRWMonitor(prepared)
    assert monitor.optimizer is optimizer
    criterion(model(X), Y).backward()
    prepared.step()
    assert len(monitor) == 1


def test_detach_leaves_no_trace_and_keeps_the_rows() -> None:
    model, criterion, optimizer = setting()
    monitor = IRWMonitor(optimizer)
    step_on(BATCHES[0], model, criterion, optimizer)
    monitor.detach()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    step_on(BATCHES[1], model, criterion, optimizer)
    assert len(monitor) == 1


def saved(*states: Any) -> Any:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_monitor_is_the_uninterrupted_one() -> None:
    whole, first, second = (setting(class_balance=True) for _ in range(3))
    uninterrupted = IRWMonitor(whole[2], capacity=10)
    for batch in BATCHES * 6:
        step_on(batch, *whole)
    broken_off = IRWMonitor(first[2], capacity=10)
    for batch in BATCHES * 3:
        step_on(batch, *first)
    model, optimizer, rows = saved(
        first[0].state_dict(), first[2].state_dict(), broken_off.state_dict()
    )
    second[0].load_state_dict(model)
    second[2].load_state_dict(optimizer)
    resumed = IRWMonitor(second[2], capacity=10)
    resumed.load_state_dict(rows)
    for batch in BATCHES * 3:
        step_on(batch, *second)
    assert str(resumed.rows()) == str(uninterrupted.rows()), "NaN prints as NaN"
    assert resumed.interval == uninterrupted.interval > 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda state: None, TypeError, "state_dict=None: expected what state_dict"),
        (lambda state: {}, ValueError, "state_dict has no 'interval': expected what"),
        (lambda state: {**state, "rows": [{}]}, KeyError, None),
        (lambda state: {**state, "held": {}}, KeyError, None),
    ],
    ids=["none", "of something else", "broken rows", "a broken age"],
)
def test_a_state_that_is_none_leaves_the_rows(change: Any, error: Any, match: str) -> None:
    run = setting()
    monitor = IRWMonitor(run[2])
    for batch in BATCHES:
        step_on(batch, *run)
    before = str(monitor.rows())
    with pytest.raises(error, match=match):
        monitor.load_state_dict(change(monitor.state_dict()))
    assert str(monitor.rows()) == before


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_global_scheme_keeps_the_age_of_its_weights(stop: int) -> None:
    def start() -> tuple[Any, ...]:
        model, criterion, optimizer = setting()
        data = torch.utils.data.TensorDataset(X, Y)
        loader = torch.utils.data.DataLoader(data, batch_size=16)
        scheme = GlobalScheme(optimizer, loader, refresh=3, unit="steps")
        return model, criterion, optimizer, scheme, IRWMonitor(optimizer)

    def run(parts: tuple[Any, ...], until: int) -> None:
        model, criterion, optimizer, scheme, _ = parts
        while True:
            for x, y in scheme:
                step_on((x, y, None), model, criterion, optimizer)
                if optimizer.steps == until:
                    return

    whole, first, second = start(), start(), start()
    run(whole, 10)
    run(first, stop)
    states = saved(*(part.state_dict() for part in (first[0], *first[2:])))
    for part, state in zip((second[0], *second[2:]), states, strict=True):
        part.load_state_dict(state)
    run(second, 10)
    ages = [row["held_for"] for row in second[4].rows()]
    assert ages == [row["held_for"] for row in whole[4].rows()] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_copies_listen_to_the_copied_optimizer(copied: Any) -> None:
    model, criterion, optimizer = setting()
    monitor = IRWMonitor(optimizer)
    step_on(BATCHES[0], model, criterion, optimizer)
    parts = copied((model, criterion, optimizer, monitor))
    assert parts[3].optimizer is parts[2]
    step_on(BATCHES[1], *parts[:3])
    assert [len(parts[3]), len(monitor)] == [2, 1]


def test_many_classes_in_little_memory() -> None:
    """At most one breakdown a sample, whatever the number of classes."""
    model, criterion = mlp(classes=500), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model, criterion=criterion
    )
    monitor = IRWMonitor(optimizer)
    criterion(model(X), torch.arange(80) * 6).backward()
    optimizer.step()
    (row,) = monitor._course.rows
    assert row.breakdowns["class"].numbers.shape == (80, 5)
