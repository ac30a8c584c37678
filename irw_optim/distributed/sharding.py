"""What `fully_shard` has done to a model, and which shard belongs to which whole parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from irw_optim.processes import is_sharded_here

Group = dict[Tensor, Tensor]
"""What FSDP gathers together: the shards that a user's optimizer holds, and the whole parameters
that autograd meets."""


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
