"""What `fully_shard` has done to a model, and which shard belongs to which whole parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

Group = dict[Tensor, Tensor]
"""What FSDP gathers together: the shards that a user's optimizer holds, and the whole parameters
that autograd meets."""


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model, or to some of it."""
    return any(map(is_sharded_here, model.modules()))


def is_sharded_here(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module."""
    return "FSDPModule" in _names_of_bases(module)


def is_shard(parameter: Tensor) -> bool:
    """Whether this is a DTensor, by name: importing what makes them takes as long as torch."""
    return "DTensor" in _names_of_bases(parameter)


def _names_of_bases(thing: object) -> list[str]:
    return [kind.__name__ for kind in type(thing).__mro__]


def groups_of(model: nn.Module) -> list[Group]:
    """What FSDP gathers together, in the order of the model's modules.

    torch offers no public way from a shard to the whole parameter. Groups that were never
    gathered, on any rank then, are left out.
    """
    found: list[Group] = []
    seen: set[int] = set()
    for module in model.modules():
        if not is_sharded_here(module):
            continue
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        for group in state._fsdp_param_groups:
            if id(group) in seen:
                continue
            seen.add(id(group))
            pairs = (
                (p.sharded_param, getattr(p, "_unsharded_param", None)) for p in group.fsdp_params
            )
            found.append({shard: whole for shard, whole in pairs if whole is not None})
    return found
