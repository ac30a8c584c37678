"""Time and peak memory of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median
from time import perf_counter

import torch

Step = Callable[[], object]
_MEASURED = "irw_optim: the step that is measured"


def median_seconds(
    steps: Sequence[Step],
    repeats: int = 7,
    inner: int = 1,
    device: torch.device | str | None = None,
) -> list[float]:
    """Median time of each step, taken in turns so that a slower machine slows all alike.

    Of ``repeats`` rounds of ``inner`` calls, after one; ``device`` is a GPU where there is one.
    """
    device = _given_or_found(device)
    times: list[list[float]] = [[] for _ in steps]
    for round_ in range(repeats + 1):
        for step, taken in zip(steps, times, strict=True):
            _wait(device)
            start = perf_counter()
            for _ in range(inner):
                step()
            _wait(device)
            if round_:
                taken.append((perf_counter() - start) / inner)
    return [median(taken) for taken in times]


def peak_bytes(step: Step, device: torch.device | str | None = None) -> int:
    """The most bytes of tensors that one call holds at once on a device, beyond what stays."""
    device = _given_or_found(device)
    step()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()  # the profiler may miss, or not, that something older is freed: in here alone
        with torch.profiler.record_function(_MEASURED):
            step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(e.start_ns() for e in events if e.name() == _MEASURED)
    memory = (e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() >= start)
    held: list[int] = list(accumulate(memory, initial=0))
    return max(held) - min(held)


def _given_or_found(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
