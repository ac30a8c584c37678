"""What a step asks of a device: when the host waits for it, and how many kernels it starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from irw_optim.measure import Step

WAITS = "synchronizing CUDA operation"
"""What torch's warning says, in its sync debug mode."""

COPIES = ("Memcpy", "Memset")


def syncs(step: Step, device: torch.device) -> int | None:
    """How often the host waits in one call; None where nothing tells."""
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return warned(step)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def warned(step: Step) -> int:
    """How many warnings of a wait one call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return sum(WAITS in str(warning.message) for warning in caught)


def kernels(step: Step, device: torch.device) -> int | None:
    """How many kernels one call starts; None where there are none."""
    if device.type != "cuda":
        return None
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profile:
        step()
        torch.cuda.synchronize(device)
    return on_device(profile.events())


def on_device(events: Iterable[Any]) -> int:
    """How many of a profiler's events are kernels, and no copies."""
    ran = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.name.startswith(COPIES) for event in ran)
