"""What else happens to a sharded model: loops that bite, messages, memory, and what is refused."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import ranked
import torch
from sharded_trainings import CAN_SHARD, optimizer_for, shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from trainings import CLASSES, FEATURES, MODELS, Transformer, data, mlp, whole

from irw_optim import IRWMonitor, IRWOptimizer, verify
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.sharding import groups_of
from irw_optim.gradients.layers import LayerCall
from irw_optim.schemes import global_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_SHARD, reason="refused with this torch"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning"),
]

HEADER = 7  # samples, labels?, counts?, passes, and of one pass: elements, divisor, factor
SIZES = {"usual": [20, 17], "one sample": [36, 1], "nobody": [37, 0], "nobody first": [0, 37]}


class Setting:
    """A model, an optimizer and this rank's part of the data; all of it where there is one rank."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        model: str = "mlp",
        sizes: str = "usual",
        dtype: torch.dtype = torch.float64,
        fsdp: dict[str, Any] | None = None,
        **irw: Any,
    ) -> None:
        torch.manual_seed(0)
        self.ranks = world_size
        self.model = MODELS[model]().to(dtype)
        x, y = data()
        shards = [part.tensor_split(2) for part in torch.arange(len(x)).split(SIZES[sizes])]
        passes = [torch.cat(part) for part in zip(*shards, strict=True)]
        if world_size > 1:
            passes = shards[rank]
        if world_size > 1 or fsdp:
            shard(self.model, **(fsdp or {}))
        self.batches = [(x[part].to(dtype), y[part]) for part in passes]
        self.x, self.y = (torch.cat(tensors) for tensors in zip(*self.batches, strict=True))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optimizer_for(self.model, self.criterion, **irw)

    def loss(self, number: int | None = None) -> Tensor:
        """Of one of two batches, or of both together."""
        x, y = (self.x, self.y) if number is None else self.batches[number]
        return self.criterion(self.model(x), y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def parameters(self) -> Tensor:
        return torch.cat([whole(p).flatten() for p in self.model.parameters()])


# Loops: in one process and in two they must come to the same --------------------------------------


def in_one_pass(s: Setting) -> None:
    s.loss().backward()


def with_another_term(s: Setting) -> None:
    """A sum over all samples, of which every rank has its own and FSDP takes the average."""
    output = s.model(s.x)
    (s.criterion(output, s.y) + 0.01 * s.ranks * output.square().sum()).backward()


def twice_through_one_graph(s: Setting) -> None:
    loss = s.loss()
    loss.backward(retain_graph=True)
    loss.backward()


def two_forwards_before_one_backward(s: Setting) -> None:
    (s.loss(0) + 0.5 * s.loss(1)).backward()


def two_forwards_before_two_backwards(s: Setting) -> None:
    first, second = s.loss(0), s.loss(1)
    second.backward()
    first.backward()


def reduced_in_the_last_pass(s: Setting) -> None:
    sync = getattr(s.model, "set_requires_gradient_sync", lambda _: None)
    sync(False)
    s.loss(0).backward()
    sync(True)
    s.loss(1).backward()


def clipped(s: Setting) -> None:
    s.loss().backward()
    norm: Any = torch.nn.utils.clip_grad_norm_(s.model.parameters(), 0.05)
    assert float(norm) > 0.05


def scaled(s: Setting) -> None:
    (1024.0 * s.loss()).backward()
    for p in s.model.parameters():
        p.grad /= 1024.0


def evaluate(s: Setting) -> None:
    s.model.eval()
    with torch.no_grad():
        s.loss()
    s.model.train()


def after_an_evaluation(s: Setting) -> None:
    evaluate(s)
    s.loss().backward()


def made_after_an_evaluation(s: Setting) -> None:
    """A forward leaves the outermost parameters whole, of which one joins the optimizer later."""
    if s.optimizer.steps == 0:
        s.optimizer.detach()
        everything = list(s.model.parameters())
        inner = torch.optim.SGD(everything[1:], lr=0.3, momentum=0.9)
        evaluate(s)
        s.optimizer = IRWOptimizer(inner, alpha=0.2, model=s.model, criterion=s.criterion)
        evaluate(s)
        s.optimizer.add_param_group({"params": everything[:1]})
    s.loss().backward()


class Loop:
    """A class, so that it can be sent to the processes."""

    def __init__(self, loop: Callable[[Setting], None], **setting: Any) -> None:
        self.loop = loop
        self.setting = setting

    def __call__(self, rank: int, world_size: int) -> Tensor:
        s = Setting(rank, world_size, **self.setting)
        for _ in range(3):
            s.optimizer.zero_grad()
            self.loop(s)
            s.optimizer.step()
        return s.parameters()


LOOPS: dict[str, ranked.Case] = {
    loop.__name__: Loop(loop)
    for loop in (
        with_another_term,
        twice_through_one_graph,
        two_forwards_before_one_backward,
        two_forwards_before_two_backwards,
        reduced_in_the_last_pass,
        clipped,
        scaled,
        after_an_evaluation,
    )
}
LOOPS |= {
    f"{model}, {sizes}": Loop(in_one_pass, model=model, sizes=sizes)
    for model in ("mlp", "time first")
    for sizes in SIZES
    if sizes != "usual"
}
LOOPS["made after an evaluation"] = Loop(made_after_an_evaluation, model="transformer")
LOOPS["checkpointed"] = Loop(in_one_pass, model="checkpointed")
LOOPS["float32"] = Loop(in_one_pass, dtype=torch.float32)


# One case each ------------------------------------------------------------------------------------


def average_of_ranks(rank: int, world_size: int) -> Any:
    """``worst_off="local"``."""
    s = Setting(rank, world_size, worst_off="local")
    s.loss().backward()
    record = s.optimizer.last_step
    return [whole(p.grad) for p in s.model.parameters()], len(record.weights), record.own


def in_half_precision(rank: int, world_size: int) -> dict[str, Tensor]:
    """Two processes, each by itself (a mesh of one), and plain averaging."""
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("others", "own"))["own"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    found = {}
    for name, s in (
        ("two", Setting(rank, 2, dtype=torch.float32, fsdp={"mp_policy": policy})),
        ("one", Setting(0, 1, dtype=torch.float32, fsdp={"mp_policy": policy, "mesh": alone})),
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


def messages(s: Setting) -> list[tuple[str, int]]:
    """The collectives of a step, by name, with the numbers in each."""
    for _ in range(2):
        s.step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        s.step()
    found = [event for event in recorded.events() if event.name.startswith("gloo:")]
    return [(event.name, event.input_shapes[0][0]) for event in found]


def counted(rank: int, world_size: int) -> Any:
    plain = Setting(rank, world_size)
    plain.optimizer.detach()
    plain.optimizer = plain.optimizer.inner
    return messages(plain), messages(Setting(rank, world_size))


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


def not_finite(rank: int, world_size: int) -> None:
    """On rank 1; both raise, and keep their parameters."""
    s = Setting(rank, world_size)
    s.x[3] = s.x[3] / (1 - rank)
    before = s.parameters()
    try:
        s.step()
    finally:
        assert torch.equal(before, s.parameters())


def uncovered(rank: int, world_size: int) -> None:
    Setting(rank, world_size, "gru").step()


def batch_statistics(rank: int, world_size: int) -> None:
    Setting(rank, world_size, "batch statistics").step()


def mixing(rank: int, world_size: int) -> None:
    """On rank 1 there is one sample, which shows nothing."""
    Setting(rank, world_size, "mixing", "one sample").step()


def backward_twice(rank: int, world_size: int) -> None:
    loss = Setting(rank, world_size).loss()
    loss.backward()
    loss.backward()


def sharded_too_late(rank: int, world_size: int) -> None:
    model = mlp()
    optimizer = optimizer_for(model)
    shard(model)
    losses = nn.functional.cross_entropy(
        model(torch.randn(4, FEATURES)), torch.zeros(4).long(), reduction="none"
    )
    optimizer.backward(losses)


def in_part(rank: int, world_size: int) -> None:
    model = mlp()
    fully_shard(model[0])
    optimizer_for(model)


def replicated(rank: int, world_size: int) -> None:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards")))
    optimizer_for(model)


def also_in_ddp(rank: int, world_size: int) -> None:
    shard(model := mlp())
    optimizer_for(nn.Sequential(model, DistributedDataParallel(mlp())))


def without_the_model(rank: int, world_size: int) -> None:
    shard(model := mlp())
    IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2)


def with_a_learnt_criterion(rank: int, world_size: int) -> None:
    shard(model := mlp())
    criterion = nn.CrossEntropyLoss()
    criterion.temperature = nn.Parameter(torch.ones(()))
    optimizer_for(model, criterion)


class Refused:
    """Arguments of IRWOptimizer; a class, so that it can be sent to the processes."""

    def __init__(self, **irw: Any) -> None:
        self.irw = irw

    def __call__(self, rank: int, world_size: int) -> None:
        shard(model := mlp())
        optimizer_for(model, **self.irw)


def own_rule(losses: Tensor, gradients: Any, worst_off: Tensor) -> Tensor:
    return losses


def verified(rank: int, world_size: int) -> None:
    s = Setting(rank, world_size)
    s.optimizer.detach()
    verify(s.model, s.x, s.y, s.criterion)


def of_a_data_set(rank: int, world_size: int) -> None:
    shard(model := mlp())
    loader = DataLoader(TensorDataset(torch.randn(8, FEATURES), torch.zeros(8).long()), 4)
    global_weights(model, nn.CrossEntropyLoss(), loader, alpha=0.2)


REFUSALS: dict[str, tuple[ranked.Case, str]] = {
    "not finite": (not_finite, "FloatingPointError: the losses or gradients of 1 samples"),
    "uncovered": (uncovered, "they do not cover cells.bias_hh_l0, cells.bias_ih_l0, cells.weight"),
    "batch statistics": (
        batch_statistics,
        "they do not cover 1.bias, 1.weight: choose score_param",
    ),
    "mixing": (mixing, "the ghost products differ from autograd for first.bias, first.weight: "),
    "backward twice": (backward_twice, "RuntimeError: this loss was already backpropagated"),
    "too late": (sharded_too_late, "RuntimeError"),
    "in part": (in_part, "NotImplementedError: 2.weight is not sharded, and FSDP would not red"),
    "HSDP": (replicated, "is placed as (Replicate(), Shard(dim=0)): expected fully_shard over one"),
    "in DDP": (also_in_ddp, "NotImplementedError: model is in DistributedDataParallel and in ful"),
    "no model": (without_the_model, "NotImplementedError: the optimizer holds DTensors, and mode"),
    "criterion": (with_a_learnt_criterion, "criterion has a parameter, temperature, that fully_"),
    "autodiff": (Refused(engine="autodiff"), "NotImplementedError: engine='autodiff' under full"),
    "own rule": (Refused(weighting=own_rule), "under fully_shard: a rule of one's own may ask"),
    "logical batch": (Refused(accumulation_steps=2), "accumulation_steps=2 under fully_shard:"),
    "verify": (verified, "NotImplementedError: verify is not there for a model under fully_shard"),
    "data set": (of_a_data_set, "a weight for every sample of a data set is not there for a mod"),
}
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
