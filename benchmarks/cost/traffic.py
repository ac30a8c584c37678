"""What a step sends: as a list of messages, and as two processes are seen to send it."""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.training import step
from irw_optim import DBSCANFilter, IRWOptimizer

HEADER = 7  # samples, labels?, counts?, passes, and of one pass: elements, divisor, factor
KINDS = ("all_gather", "all_reduce")
WAYS: dict[str, dict[str, Any] | None] = {
    "DDP": None,
    "global": {},
    "local": {"worst_off": "local"},
    "IRWO": {"outliers": DBSCANFilter()},
}
FEATURES, HIDDEN, CLASSES, BATCH = 20, 16, 3, 32


class Message(NamedTuple):
    """A collective of the vector of an all-reduce, or of one process's part of a gather."""

    collective: str
    numbers: int
    width: int = 4
    """Bytes a number."""

    @property
    def bytes(self) -> int:
        return self.numbers * self.width


def messages(
    way: str, parameters: int, batch: int, factors: list[int], outline: int = 500
) -> list[Message]:
    """What every process sends in a step with ``batch`` samples of its own, in one of `WAYS`.

    IRWO's ``factors`` are the numbers of one sample's layer inputs and output gradients, and its
    ``outline`` the bytes in which the processes say that their layers are alike.
    """
    losses = Message("all_gather", HEADER + 3 * batch, 8)  # with label and count
    update = Message("all_reduce", parameters)
    if way in ("DDP", "local"):
        return [update]
    if way == "IRWO":
        agreed = [Message("all_gather", 1, 8), Message("all_gather", outline, 1)]
        return [losses, *agreed, *(Message("all_gather", batch * f) for f in factors), update]
    return [losses, Message("all_reduce", parameters), Message("all_gather", batch), update]


def table() -> list[dict[str, Any]]:
    """What two processes send in a step of a small network, and that it is what is said here."""
    seen, other = in_two_processes(_counted)
    assert seen == other, "the processes do not send the same"
    outline = seen["IRWO"][2][1]  # as many bytes as it takes to name the layers
    parameters = sum(p.numel() for p in _network().parameters())
    rows = []
    for way in WAYS:
        said = messages(way, parameters, BATCH, [FEATURES, HIDDEN, HIDDEN, CLASSES], outline)
        assert sorted(seen[way]) == sorted(m[:2] for m in said), (way, seen[way], said)
        kinds = {k: " + ".join(str(m.bytes) for m in said if m.collective == k) for k in KINDS}
        rows.append({"step": way, **{f"{kind}, bytes": text for kind, text in kinds.items()}})
    return rows


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def _counted(rank: int) -> dict[str, list[tuple[str, int]]]:
    return {way: _messages_of(irw) for way, irw in WAYS.items()}


def _messages_of(irw: dict[str, Any] | None) -> list[tuple[str, int]]:
    model, criterion = DistributedDataParallel(_network()), nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if irw is not None:
        optimizer = IRWOptimizer(optimizer, alpha=0.2, model=model, criterion=criterion, **irw)
    x, y = torch.randn(BATCH, FEATURES), torch.arange(BATCH) % CLASSES
    for _ in range(3):  # the first two set things up
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            step(model, criterion, optimizer, x, y)
    sent = [event for event in recorded.events() if event.name.startswith("gloo:")]
    return [(event.name.removeprefix("gloo:"), event.input_shapes[0][0]) for event in sent]


def in_two_processes(work: Callable[..., Any], *given: Any) -> list[Any]:
    """What ``work(rank, ...)`` returns in each of two gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, work, given), nprocs=2)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(2)]


def _process(rank: int, folder: str, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(work(rank, *given), f"{folder}/{rank}")
    dist.destroy_process_group()
