"""What else happens to a sharded model: loops that bite, messages, memory, and what is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import ranked
import torch
from sharded_loops import LOOPS, SIZES, Setting
from sharded_refusals import REFUSALS
from sharded_trainings import CAN_SHARD
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from trainings import CLASSES, FEATURES, Transformer, data, whole

from irw_optim import IRWMonitor
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.shards import groups_of
from irw_optim.gradients.layers import LayerCall

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_SHARD, reason="refused with this torch"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning"),
]

HEADER = 7  # samples, labels?, counts?, passes, and of one pass: elements, divisor, factor


def average_of_ranks(rank: int, world_size: int) -> Any:
    """``worst_off="local"``."""
    s = Setting(rank, world_size, worst_off="local")
    s.loss().backward()
    record = s.optimizer.last_step
    return [whole(p.grad) for p in s.model.parameters()], len(record.weights), record.own


def in_half_precision(rank: int, world_size: int) -> dict[str, Tensor]:
    """Two processes, each by itself (a mesh of one), and plain averaging.

    With 8 bits losses nearly tie, and rounding would decide who is in S: so everybody is.
    """
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("others", "own"))["own"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    found = {}
    for name, s in (
        ("two", Setting(rank, 2, alpha=1.0, dtype=torch.float32, fsdp={"mp_policy": policy})),
        (
            "one",
            Setting(
                0, 1, alpha=1.0, dtype=torch.float32, fsdp={"mp_policy": policy, "mesh": alone}
            ),
        ),
        (
            "plain",
            Setting(rank, 2, dtype=torch.float32, fsdp={"mp_policy": policy}, weighting="uniform"),
        ),
    ):
        before = s.parameters()
        for _ in range(3):
            s.step()
        found[name] = s.parameters() - before
    return found


def counted(rank: int, world_size: int) -> Any:
    plain = Setting(rank, world_size)
    plain.optimizer.detach()
    plain.optimizer = plain.optimizer.inner
    return ranked.sent(plain.step), ranked.sent(Setting(rank, world_size).step)


def memory(rank: int, world_size: int) -> list[tuple[int, int]]:
    """At every message of scores: the numbers in it, and those of whole parameters in memory."""
    s = Setting(rank, world_size, "transformer")
    found = []
    total = Ranks.total

    def watched(self: Ranks, parts: Any, layout: Any, rows: Any = ()) -> Any:
        wholes = [p for group in groups_of(s.model) for p in group.values()]
        held = sum(p.untyped_storage().size() // p.itemsize for p in wholes)
        found.append((sum(p.numel() for p in layout), held))
        return total(self, parts, layout, rows)

    Ranks.total = watched  # type: ignore[method-assign]
    try:
        s.step()
    finally:
        Ranks.total = total  # type: ignore[method-assign]
    return found


def left_over(rank: int, world_size: int) -> int:
    """Layer calls that live after a step, and after one whose graph was kept."""
    s = Setting(rank, world_size, "transformer")
    s.step()
    loss = s.loss()
    loss.backward(retain_graph=True)
    del loss
    return sum(isinstance(thing, LayerCall) for thing in gc.get_objects())


def resumed(rank: int, world_size: int) -> Any:
    """By the optimizer's own state, and by torch's functions for distributed checkpoints."""
    first = Setting(rank, world_size, warmup_steps=3)
    for _ in range(2):
        first.step()
    model = copy.deepcopy(get_model_state_dict(first.model))
    own = copy.deepcopy(first.optimizer.state_dict())
    named = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    options = StateDictOptions(full_state_dict=True)
    full = get_model_state_dict(first.model, options=options)
    full_named = get_optimizer_state_dict(first.model, first.optimizer, options=options)
    for _ in range(2):
        first.step()
    found = [first.parameters()]
    for by_name in (False, True):
        other = Setting(rank, world_size, warmup_steps=3)
        set_model_state_dict(other.model, model)
        if by_name:
            set_optimizer_state_dict(other.model, other.optimizer, named)
            other.optimizer.load_own_state(own["irw"])
        else:
            other.optimizer.load_state_dict(own)
        for _ in range(2):
            other.step()
        found.append(other.parameters())
    return found, full, full_named, own["irw"]


def monitored(rank: int, world_size: int) -> Any:
    s = Setting(rank, world_size)
    monitor = IRWMonitor(s.optimizer)
    for _ in range(3):
        s.step()
    return [row["gradient_norm"] for row in monitor.rows()], s.optimizer.steps


CASES: dict[str, ranked.Case] = {
    **LOOPS,
    "local": average_of_ranks,
    "half precision": in_half_precision,
    "messages": counted,
    "memory": memory,
    "left over": left_over,
    "resumed": resumed,
    "monitored": monitored,
    **{name: case for name, (case, _) in REFUSALS.items()},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranked.run(CASES, 2, tmp_path_factory.mktemp("apart"))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_comes_to_the_same_in_two_processes(found, loop):
    expected = LOOPS[loop](0, 1)
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-9
    for parameters in found.of(loop):
        assert (parameters - expected).norm() <= tolerance * expected.norm()


def test_local_is_the_average_of_the_ranks(found):
    x, y = data()
    mean: list[Tensor] = []
    for part in torch.arange(len(x)).split(SIZES["usual"]):
        s = Setting(0, 1)
        s.criterion(s.model(x[part]), y[part]).backward()
        some = [p.grad / 2 for p in s.model.parameters()]
        mean = [a + b for a, b in zip(mean, some, strict=True)] if mean else some
    for rank, (gradients, size, own) in enumerate(found.of("local")):
        torch.testing.assert_close(gradients, mean)
        assert size == SIZES["usual"][rank]
        assert own is None


def test_in_half_precision_as_far_as_it_goes(found):
    """Three steps in bfloat16; what rounding does is far below what the weights do."""
    for updates in found.of("half precision"):
        length = updates["one"].norm()
        assert (updates["two"] - updates["one"]).norm() < 0.02 * length
        assert (updates["plain"] - updates["one"]).norm() > 0.3 * length


def test_messages_above_plain_fsdp(found):
    """2 numbers to agree, the losses, P numbers a group at a time, the scores, and the parameters
    once more. FSDP gathers the last layer first, and no longer ahead of time."""
    hidden, last = (FEATURES + 1) * 8, (8 + 1) * CLASSES
    for plain, told in found.of("messages"):
        forward, backward = plain[:2], plain[2:]
        gathered = [message for message in backward if message[0] == "gloo:all_gather"]
        weighed = [
            ("gloo:all_gather", HEADER + 3 * 20),
            ("gloo:all_reduce", hidden),
            ("gloo:all_reduce", last),
            ("gloo:all_gather", 20),
        ]
        above = [*forward, ("gloo:all_gather", 2), *gathered, *weighed]
        assert told[: len(above)] == above
        assert sorted(told[len(above) :]) == sorted(backward)


def test_no_parameter_is_whole_while_scores_are_made(found):
    numbers = sum(p.numel() for p in Transformer().parameters())
    for told in found.of("memory"):
        assert sum(sent for sent, _ in told) == numbers
        assert max(sent for sent, _ in told) < numbers / 2
        assert {held for _, held in told} == {0}


def test_nothing_of_a_step_is_kept(found):
    assert found.of("left over") == [0, 0]


def test_a_checkpoint_goes_on(found):
    """In as many processes, and in one."""
    whole_run = Setting(0, 1, warmup_steps=3)
    for _ in range(4):
        whole_run.step()
    (runs, model, named, own), (others, *_) = found.of("resumed")
    for parameters in (*runs, *others):
        torch.testing.assert_close(parameters, whole_run.parameters())
    alone = Setting(0, 1, warmup_steps=3)
    alone.model.load_state_dict(model)
    set_optimizer_state_dict(
        alone.model, alone.optimizer, named, options=StateDictOptions(full_state_dict=True)
    )
    alone.optimizer.load_own_state(own)
    for _ in range(2):
        alone.step()
    torch.testing.assert_close(alone.parameters(), whole_run.parameters())


def test_the_monitor_sees_the_gradient_of_all(found):
    s = Setting(0, 1)
    monitor = IRWMonitor(s.optimizer)
    for _ in range(3):
        s.step()
    expected = [row["gradient_norm"] for row in monitor.rows()]
    for norms, steps in found.of("monitored"):
        assert norms == pytest.approx(expected)
        assert steps == 3


@pytest.mark.parametrize("case", REFUSALS)
def test_every_rank_says_what_is_refused(found, case):
    for traceback in found.raised(case):
        assert REFUSALS[case][1] in traceback
