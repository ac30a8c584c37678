"""Twenty thousand steps: what a training keeps does not grow. (Other engines: `test_safety`.)

An object kept at every step shows among the objects of Python; a node of the graph or the memory of
a tensor, which Python may not see, in what the process holds.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from models import mlp
from torch import Tensor, nn

from irw_optim import IRWOptimizer

STEPS, SETTLING = 20_000, 4_000
STATM = Path("/proc/self/statm")
SIZES = (8, 8, 8, 3, 8, 1, 8, 5)  # short last batches, and one of a single sample


def live_objects() -> tuple[int, int]:
    """Tensors, and all other objects that can hold something."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in objects)
    return tensors, len(objects) - tensors


def resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if STATM.exists() else 0


@pytest.mark.slow
def test_memory_is_flat_over_twenty_thousand_steps() -> None:
    model, criterion = mlp(4, 6, 3, act=nn.ReLU), nn.MSELoss()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = IRWOptimizer(adam, alpha=0.3, model=model, criterion=criterion)
    data = [(torch.randn(size, 4), torch.randn(size, 3)) for size in SIZES]

    def train(count: int) -> None:
        for step in range(count):
            x, y = data[step % len(data)]
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    train(SETTLING)  # caches fill, and the allocator finds what it needs
    (tensors, others), memory = live_objects(), resident()
    train(STEPS - SETTLING)
    tensors_after, others_after = live_objects()
    assert tensors_after == tensors
    assert others_after < others + 200
    assert resident() - memory < 64 * (STEPS - SETTLING)  # less than any object a step
    assert optimizer.steps == STEPS
