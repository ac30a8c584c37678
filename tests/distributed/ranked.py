"""Several gloo processes for many cases: starting them takes seconds, a case takes none."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

Case = Callable[[int, int], Any]
"""``case(rank, world_size)`` runs on every rank and returns what its test looks at."""


def run(cases: Mapping[Any, Case], world_size: int, folder: Path, timeout: float = 120) -> Results:
    """Run every case on every rank; a case that raises leaves its traceback."""
    arguments = cases, world_size, str(folder), timeout
    torch.multiprocessing.spawn(_rank, arguments, nprocs=world_size)
    return Results([torch.load(folder / f"{r}", weights_only=False) for r in range(world_size)])


class Results:
    """What the cases returned, by rank."""

    def __init__(self, by_rank: list[dict[str, Any]]) -> None:
        self.by_rank = by_rank

    def of(self, case: Any) -> list[Any]:
        outcomes = [results[case] for results in self.by_rank]
        broken = [outcome for outcome in outcomes if isinstance(outcome, Raised)]
        assert not broken, "\n".join(broken)
        return outcomes

    def raised(self, case: str) -> list[str]:
        outcomes = [results[case] for results in self.by_rank]
        assert all(isinstance(outcome, Raised) for outcome in outcomes), outcomes
        return outcomes


class Raised(str):
    """A traceback."""


def _rank(
    rank: int, cases: Mapping[Any, Case], world_size: int, folder: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    results: dict[str, Any] = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            results[name] = case(rank, world_size)
        except Exception:
            results[name] = Raised(traceback.format_exc())
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def sent(step: Callable[[], object]) -> list[tuple[str, int]]:
    """The collectives of a step, by name, with the numbers in each; the first two set things up."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    found = [event for event in recorded.events() if event.name.startswith("gloo:")]
    return [(event.name, event.input_shapes[0][0]) for event in found]
