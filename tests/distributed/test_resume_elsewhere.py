"""A checkpoint goes on in another number of processes, as if nothing had happened."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import ranked
import torch
from sharded_trainings import CAN_SHARD, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from trainings import data, mlp, whole

from irw_optim import DBSCANFilter, IRWOptimizer

pytestmark = pytest.mark.slow

HALF, END = 3, 6
FULL = StateDictOptions(full_state_dict=True)
SHARES = {1: [], 2: [0.6], 4: [0.3, 0.3, 0.5]}
"""Where a batch is cut; with four ranks one has nothing."""

OPTIONS: dict[str, dict[str, Any]] = {
    "warm-up goes on": {"warmup_steps": 4},
    "warm-up is over": {"warmup_steps": 2, "center": 1.0},
    "IRWO": {"outliers": DBSCANFilter(quantile=0.8), "class_balance": True},
    "passes together": {"accumulation_steps": 2},
}
if CAN_SHARD:
    OPTIONS["sharded"] = {"warmup_steps": 4}


@dataclass
class Stretch:
    """Some steps of a training, from a checkpoint or from the start, to a checkpoint.

    Attributes:
        case: of `OPTIONS`.
        steps: their numbers, which say what their batches are.
        start: where an earlier stretch ended.
    """

    case: str
    steps: range
    start: dict[str, Any] | None = None

    def __call__(self, rank: int, world_size: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = mlp().double()
        if self.start is not None:
            model.load_state_dict(self.start["model"])
        sharded = self.case == "sharded" and world_size > 1
        called: nn.Module = model
        if sharded:
            shard(model)
        elif world_size > 1:
            called = DistributedDataParallel(model)
        inner = torch.optim.Adam(model.parameters(), lr=0.03)
        optimizer = IRWOptimizer(inner, alpha=0.2, model=model, **OPTIONS[self.case])
        if self.start is not None:
            load(model, optimizer, copy.deepcopy(self.start["optimizer"]))
        x, y = data()
        for step in self.steps:
            optimizer.zero_grad()
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(step))
            for batch in order.tensor_split(optimizer.accumulation_steps):
                part = batch.tensor_split([int(s * len(batch)) for s in SHARES[world_size]])[rank]
                losses = nn.functional.cross_entropy(called(x[part]), y[part], reduction="none")
                optimizer.backward(losses, labels=y[part])
            optimizer.step()
        return {
            "model": get_model_state_dict(model, options=FULL),
            "optimizer": saved(model, optimizer),
            "parameters": torch.cat([whole(p).flatten() for p in model.parameters()]),
            "steps": optimizer.steps,
        }


def saved(model: nn.Module, optimizer: IRWOptimizer) -> dict[str, Any]:
    """By name, as torch's functions for distributed checkpoints do, and what is IRW's own."""
    named = get_optimizer_state_dict(model, optimizer, options=FULL)
    return {**copy.deepcopy(named), "irw": optimizer.own_state()}


def load(model: nn.Module, optimizer: IRWOptimizer, state: dict[str, Any]) -> None:
    own = state.pop("irw")
    set_optimizer_state_dict(model, optimizer, state, options=FULL)
    optimizer.load_own_state(own)


def parts(steps: range, starts: dict[str, Any] | None = None) -> dict[str, ranked.Case]:
    return {case: Stretch(case, steps, starts and starts[case]) for case in OPTIONS}


@pytest.fixture(scope="module")
def whole_runs():
    return {case: Stretch(case, range(END))(0, 1)["parameters"] for case in OPTIONS}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """The first half in two processes, and the second of what one began."""
    begun = {case: Stretch(case, range(HALF))(0, 1) for case in OPTIONS}
    cases = {f"first, {case}": run for case, run in parts(range(HALF)).items()}
    cases |= {f"second, {case}": run for case, run in parts(range(HALF, END), begun).items()}
    return ranked.run(cases, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def in_four(in_two, tmp_path_factory):
    begun = {case: in_two.of(f"first, {case}")[0] for case in OPTIONS}
    return ranked.run(parts(range(HALF, END), begun), 4, tmp_path_factory.mktemp("four"))


def assert_went_on(outcome: dict[str, Any], expected: Tensor) -> None:
    assert outcome["steps"] == END
    assert (outcome["parameters"] - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("case", OPTIONS)
def test_from_one_process_to_two(case, in_two, whole_runs):
    for outcome in in_two.of(f"second, {case}"):
        assert_went_on(outcome, whole_runs[case])


@pytest.mark.parametrize("case", OPTIONS)
def test_from_two_processes_to_one(case, in_two, whole_runs):
    for begun in in_two.of(f"first, {case}"):
        outcome = Stretch(case, range(HALF, END), begun)(0, 1)
        assert_went_on(outcome, whole_runs[case])


@pytest.mark.parametrize("case", OPTIONS)
def test_from_two_processes_to_four(case, in_four, whole_runs):
    for outcome in in_four.of(case):
        assert_went_on(outcome, whole_runs[case])
