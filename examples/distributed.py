"""The same training in any number of processes: plain and with IRW, on UCI Adult.

    torchrun --nproc_per_node 2 examples/distributed.py     # two processes on this machine
    python examples/distributed.py                          # one: the same numbers

Each process takes its share of every batch. The worst-off samples are those of the whole batch, and
the step is that of one process on all of it; so the numbers do not depend on how many there are.
Runs on GPUs (one a process, NCCL) where there are any, and on the CPU (gloo) otherwise.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from adult_data import People, load_adult
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim import IRWOptimizer
from irw_optim.metrics import group_accuracy

BATCH_SIZE, LEARNING_RATE = 256, 0.1
GROUPS = ("income", "sex")


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started, or be the only one."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu"
    backend = "nccl" if on_gpu else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield torch.device(device)
    finally:
        dist.destroy_process_group()


def train(
    people: People, epochs: int, device: torch.device, irw: dict[str, Any] | None
) -> nn.Module:
    """A loop for DistributedDataParallel; what IRW adds is one line."""
    torch.manual_seed(0)
    x, y = torch.from_numpy(people.features), torch.from_numpy(people.labels)
    network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
    model, criterion = DistributedDataParallel(network), nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if irw is not None:
        optimizer = IRWOptimizer(optimizer, model=model, criterion=criterion, **irw)
    for epoch in range(epochs):
        order = torch.randperm(len(people), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH_SIZE):
            own = batch[dist.get_rank() :: dist.get_world_size()]  # this process's share
            optimizer.zero_grad()
            criterion(model(x[own].to(device)), y[own].to(device)).backward()
            optimizer.step()
    return network


def methods(options: argparse.Namespace, people: People) -> dict[str, dict[str, Any] | None]:
    """What is compared: the arguments of `IRWOptimizer`, and plain training without it."""
    irw = {"alpha": options.alpha}
    warm_up = options.epochs * math.ceil(len(people) / BATCH_SIZE) // 3
    centred = {**irw, "center": 1.0, "warmup_steps": warm_up}
    return {"plain": None, "IRW": irw, "IRW, centred": centred}


@torch.no_grad()
def accuracies(network: nn.Module, people: People) -> dict[str, float]:
    """Over everybody, and in the group that fares worst."""
    device = next(network.parameters()).device
    predicted = network(torch.from_numpy(people.features).to(device)).argmax(1).cpu().numpy()
    by_group = group_accuracy(people.labels, predicted, people.group_of(*GROUPS))
    worst = min(by_group, key=by_group.__getitem__)
    return {"all": float((predicted == people.labels).mean()), str(worst): by_group[worst]}


@torch.no_grad()
def equal_in_all_processes(network: nn.Module) -> bool:
    """Whether every process holds the same parameters, to the last bit."""
    own = torch.cat([p.flatten() for p in network.parameters()])
    first = own.clone()
    dist.broadcast(first, src=0)
    differs = (own != first).any().to(torch.int32)
    dist.all_reduce(differs)
    return not differs.item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train in each way, and let the first process print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=4, help="of each training (%(default)s)")
    parser.add_argument("--alpha", type=float, default=0.3, help="share in (0, 1] (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    people, test = load_adult()
    with process_group() as device:
        lines = [f"UCI Adult, {dist.get_world_size()} processes"]
        lines.append("training        accuracy  worst group  ranks equal  which")
        for name, irw in methods(options, people).items():
            network = train(people, options.epochs, device, irw)
            (_, accuracy), (group, worst) = accuracies(network, test).items()
            equal = "yes" if equal_in_all_processes(network) else "NO"
            lines.append(f"{name:14}{accuracy:10.1%}{worst:13.1%}  {equal:13}{group}")
        if dist.get_rank() == 0:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
