"""One rank of two; the other has a fault in its second step.

``faulty.py RANK FAULT FILE SPREAD``, where SPREAD is ``ddp`` or ``fsdp``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from irw_optim import IRWOptimizer


def train(rank: int, fault: str, file: str, spread: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=4),
    )
    model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
    model = DistributedDataParallel(model) if spread == "ddp" else fully_shard(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=0.2, model=model, criterion=criterion)
    for step in range(3):
        optimizer.zero_grad()
        loss = criterion(model(torch.randn(6, 3)), torch.randint(2, (6,)))
        if step == 1:
            if rank == 1:
                if fault == "raises":
                    raise ValueError("a fault of this rank alone")
                if fault == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "hangs":
                    time.sleep(60)
            started = time.monotonic()
        try:
            loss.backward()
        except RuntimeError as error:
            waited = time.monotonic() - started
            Path(f"{file}.{rank}").write_text(f"{waited:.1f}\n{error}")
            os._exit(3)  # what a launcher does with the rest when one has failed
        optimizer.step()


if __name__ == "__main__":
    train(int(sys.argv[1]), *sys.argv[2:])
