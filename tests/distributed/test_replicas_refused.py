"""What the processes say to each other, what is refused, and that they fail together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ranked
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trainings import CLASSES, FEATURES, data, mlp, samples

from irw_optim import DBSCANFilter, IRWOptimizer

pytestmark = pytest.mark.slow

NUMBERS = sum(p.numel() for p in mlp().parameters())
HEADER = 7  # samples, labels?, counts?, passes, and of one pass: elements, divisor, factor


class Setting:
    """One rank's model, optimizer and batch."""

    def __init__(self, rank: int, ddp: dict[str, Any] | None = None, **irw: Any) -> None:
        torch.manual_seed(0)
        self.module = mlp()
        self.model = DistributedDataParallel(self.module, **(ddp or {}))
        self.criterion = nn.CrossEntropyLoss()
        arguments = {"alpha": 0.2, "model": self.module, "criterion": self.criterion, **irw}
        self.inner = torch.optim.SGD(self.module.parameters(), lr=0.3)
        self.optimizer = IRWOptimizer(self.inner, **arguments)
        x, y = data()
        (own,) = [part[rank] for part in samples(1, 2)]
        self.x, self.y = x[own].float(), y[own]

    def loss(self) -> Tensor:
        return self.criterion(self.model(self.x), self.y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def plain(rank: int, world_size: int) -> Any:
    setting = Setting(rank)
    setting.optimizer.detach()
    setting.optimizer = setting.inner  # type: ignore[assignment]
    return ranked.sent(setting.step)


class Weighed:
    """A class, so that it can be sent to the processes."""

    def __init__(self, **irw: Any) -> None:
        self.irw = irw

    def __call__(self, rank: int, world_size: int) -> Any:
        return ranked.sent(Setting(rank, **self.irw).step)


def different_factors(rank: int, world_size: int) -> None:
    (Setting(rank).loss() * (1 + rank)).backward()


def different_options(rank: int, world_size: int) -> None:
    Setting(rank, alpha=0.2 + 0.1 * rank).step()


def join(rank: int, world_size: int) -> None:
    setting = Setting(rank)
    with setting.model.join():
        setting.loss()


def batch_statistics_of_all(rank: int, world_size: int) -> None:
    model = DistributedDataParallel(mlp())
    model.module.add_module("norm", nn.SyncBatchNorm(CLASSES))
    IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model)


def batch_statistics_of_all_later(rank: int, world_size: int) -> None:
    setting = Setting(rank)
    setting.model(setting.x)
    setting.module.add_module("norm", nn.SyncBatchNorm(CLASSES))
    setting.criterion(torch.zeros(2, CLASSES, requires_grad=True), torch.zeros(2).long())


def passes_without_gradients_in_a_static_graph(rank: int, world_size: int) -> None:
    Setting(rank, ddp={"static_graph": True}, accumulation_steps=2).loss()


def static_graph_that_is_not_reduced(rank: int, world_size: int) -> None:
    setting = Setting(rank, ddp={"static_graph": True})
    with setting.model.no_sync():
        setting.loss()


def logical_batch_that_is_not_reduced(rank: int, world_size: int) -> None:
    setting = Setting(rank, accumulation_steps=2)
    with setting.model.no_sync():
        setting.loss().backward()
    setting.optimizer.step()


def not_finite(rank: int, world_size: int) -> None:
    """On rank 1; both raise, and keep their parameters."""
    setting = Setting(rank)
    setting.x[3] = setting.x[3] / (1 - rank)
    before = [p.detach().clone() for p in setting.module.parameters()]
    try:
        setting.step()
    finally:
        assert all(map(torch.equal, before, setting.module.parameters()))


@contextmanager
def logged() -> Iterator[list[str]]:
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("irw_optim").addHandler(handler)
    yield texts
    logging.getLogger("irw_optim").removeHandler(handler)


def without_ddp(rank: int, world_size: int) -> list[str]:
    setting = Setting(rank)
    with logged() as texts:
        model = mlp()
        optimizer = IRWOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model
        )
        for _ in range(2):
            losses = nn.functional.cross_entropy(model(setting.x), setting.y, reduction="none")
            optimizer.backward(losses)
    return texts


def local(rank: int, world_size: int) -> Any:
    """Every rank by itself, and what DDP makes of it."""
    setting = Setting(rank, worst_off="local")
    setting.optimizer.zero_grad()
    setting.loss().backward()
    record = setting.optimizer.last_step
    return [p.grad for p in setting.module.parameters()], len(record.weights), record.own


def half(rank: int, world_size: int) -> Any:
    setting = Setting(rank, warmup_steps=2, weighting="cvar")
    for _ in range(3):
        setting.step()
    return setting.module.state_dict(), setting.optimizer.state_dict()


CASES: dict[str, ranked.Case] = {
    "plain": plain,
    "global": Weighed(),
    "local": Weighed(worst_off="local"),
    "cvar": Weighed(weighting="cvar"),
    "irwo": Weighed(outliers=DBSCANFilter()),
    "average of ranks": local,
    "without DDP": without_ddp,
    "half": half,
    "SyncBatchNorm": batch_statistics_of_all,
    "SyncBatchNorm, later": batch_statistics_of_all_later,
    "static graph, logical batches": passes_without_gradients_in_a_static_graph,
    "static graph, not reduced": static_graph_that_is_not_reduced,
    "logical batch, not reduced": logical_batch_that_is_not_reduced,
    "join": join,
    "not finite": not_finite,
    "different factors": different_factors,
    "different options": different_options,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranked.run(CASES, 2, tmp_path_factory.mktemp("apart"))


def above_plain(found: ranked.Results, case: str) -> list[list[tuple[str, int]]]:
    reduced = found.of("plain")
    assert reduced == [[("gloo:all_reduce", NUMBERS)]] * 2
    told = [list(messages) for messages in found.of(case)]
    for messages in told:
        assert messages.pop() == ("gloo:all_reduce", NUMBERS)  # DDP's own
    return told


def test_a_step_costs_two_gathers_and_one_reduction_above_ddp(found):
    """B losses (with label and count) in room for the largest shard; P numbers; B scores."""
    expected = [
        ("gloo:all_gather", HEADER + 3 * 20),
        ("gloo:all_reduce", NUMBERS),
        ("gloo:all_gather", 20),
    ]
    # A busy machine's profiler may list messages of different kinds in another order.
    assert [sorted(told) for told in above_plain(found, "global")] == [sorted(expected)] * 2


def test_the_losses_alone_cost_one_gather(found):
    assert above_plain(found, "cvar") == [[("gloo:all_gather", HEADER + 3 * 20)]] * 2


def test_local_costs_nothing(found):
    assert above_plain(found, "local") == [[]] * 2


def test_the_filter_sends_factors_and_no_gradients(found):
    """Inputs and output gradients of two layers; nothing is reduced, since G G^T has the scores."""
    for told in above_plain(found, "irwo"):
        assert {name for name, _ in told} == {"gloo:all_gather"}
        factors = sorted(20 * width for width in (FEATURES, 8, 8, CLASSES))
        assert sorted(number for _, number in told[-4:]) == factors


def test_local_is_the_average_of_the_ranks(found):
    x, y = data()
    mean: list[Tensor] | None = None
    for part in samples(1, 2)[0]:
        torch.manual_seed(0)
        model, criterion = mlp(), nn.CrossEntropyLoss()
        inner = torch.optim.SGD(model.parameters(), lr=0.3)
        optimizer = IRWOptimizer(inner, alpha=0.2, model=model, criterion=criterion)
        criterion(model(x[part].float()), y[part]).backward()
        optimizer.detach()
        some = [p.grad / 2 for p in model.parameters()]
        mean = some if mean is None else [a + b for a, b in zip(mean, some, strict=True)]
    for rank, (gradients, size, own) in enumerate(found.of("average of ranks")):
        torch.testing.assert_close(gradients, mean)
        assert size == (20, 17)[rank]
        assert own is None


def test_a_model_outside_of_ddp_is_said_once(found):
    for texts in found.of("without DDP"):
        assert len([t for t in texts if "not in DistributedDataParallel" in t]) == 1


def test_a_checkpoint_goes_on_in_another_number_of_processes(found):
    (weights, state), _ = found.of("half")

    def alone(steps: int, resumed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, criterion = mlp(), nn.CrossEntropyLoss()
        optimizer = IRWOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.3),
            alpha=0.2,
            model=model,
            criterion=criterion,
            warmup_steps=2,
            weighting="cvar",
        )
        if resumed:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            assert optimizer.steps == 3
        x, y = data()
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(x.float()), y).backward()
            optimizer.step()
        return list(model.parameters())

    torch.testing.assert_close(alone(3, resumed=True), alone(6, resumed=False))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("SyncBatchNorm", "NotImplementedError: module.norm is a SyncBatchNorm"),
        ("SyncBatchNorm, later", "NotImplementedError: module.norm is a SyncBatchNorm"),
        ("static graph, logical batches", "NotImplementedError: accumulation_steps=2 in Distr"),
        ("static graph, not reduced", "RuntimeError: the first backward pass of Distributed"),
        ("logical batch, not reduced", "RuntimeError: a logical batch ends before its last pass"),
        ("join", "NotImplementedError: the model trains inside DistributedDataParallel.join()"),
        ("not finite", r"FloatingPointError: the losses or gradients of 1 samples are not finite"),
        ("different factors", "different factors, [1.0, 2.0]"),
        ("different options", "ValueError: alpha differs between the processes: [0.2, 0.3"),
    ],
)
def test_every_rank_says_what_is_wrong(found, case, text):
    for traceback in found.raised(case):
        assert text in traceback
