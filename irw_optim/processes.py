"""Whether a model trains in several processes, told without loading what that takes."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

has_group: Callable[[], bool] = getattr(dist, "is_initialized", lambda: False)
"""Whether a default process group is there."""


def several_processes() -> bool:
    """Whether one of more than one process is."""
    return has_group() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if has_group() else (0, 1)


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model, or to some of it."""
    return any(map(is_sharded_here, model.modules()))


def is_sharded_here(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module."""
    return "FSDPModule" in names_of_bases(module)


def is_shard(parameter: Tensor) -> bool:
    """Whether this is a DTensor, by name: importing what makes them takes as long as torch."""
    return "DTensor" in names_of_bases(parameter)


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a sharded model for ``what`` takes a whole one."""
    if is_sharded(model):
        raise NotImplementedError(
            f"{what} is not there for a model under fully_shard: expected a model that is whole, "
            "or one in DistributedDataParallel"
        )


def names_of_bases(thing: object) -> set[str]:
    """Of the classes that it is of: to import them may take long, or not be possible."""
    return {kind.__name__ for kind in type(thing).__mro__}
