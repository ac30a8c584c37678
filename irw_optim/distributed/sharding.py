"""What `fully_shard` has done to a model, and which of it is refused before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.processes import is_shard, is_sharded, is_sharded_here

Group = dict[Tensor, Tensor]
"""What FSDP gathers together: the shards that a user's optimizer holds, and the whole parameters
that autograd meets."""

TESTED_FROM = "2.13"
"""The torch from which on FSDP's own tables are those that are read here."""


def groups_of(model: nn.Module) -> list[Group]:
    """What FSDP gathers together, in the order of the model's modules.

    torch offers no public way from a shard to the whole parameter. Groups that were never
    gathered, on any rank then, are left out.
    """
    states: list[Any] = [m._get_fsdp_state() for m in model.modules() if is_sharded_here(m)]  # type: ignore[operator]
    groups = dict.fromkeys(group for state in states for group in state._fsdp_param_groups)
    found = []
    for group in groups:
        pairs = ((p.sharded_param, getattr(p, "_unsharded_param", None)) for p in group.fsdp_params)
        found.append({shard: whole for shard, whole in pairs if whole is not None})
    return found


def names_of(parameters: Iterable[Tensor], model: nn.Module) -> list[str]:
    """Names in the model of whole parameters; shapes for what is not the model's."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for group in groups_of(model):
        names |= {whole: names[shard] for shard, whole in group.items() if shard in names}
    return [names.get(p, f"a leaf of shape {tuple(p.shape)}") for p in parameters]


def check_sharding(
    model: nn.Module | None,
    criterion: nn.Module | None,
    parameters: Iterable[Tensor],
    *,
    engine: object,
    weighting: Any,
    accumulation_steps: object,
) -> None:
    """Check a sharded model, and the options that it does not take.

    Raises:
        NotImplementedError: parameters that `fully_shard` does not reduce, or shards in more than
            one dimension, or an option whose gradients would be as large as the model.
    """
    if model is None or not is_sharded(model):
        if any(map(is_shard, parameters)):
            raise NotImplementedError(
                "the optimizer holds DTensors, and model= is no module that fully_shard was "
                "applied to: expected IRWOptimizer(..., model=model) with fully_shard(model); "
                "tensor parallelism is not supported"
            )
        return
    _check_shards(model)
    for name, p in () if criterion is None else criterion.named_parameters():
        if p.requires_grad and not is_shard(p):
            raise NotImplementedError(
                f"criterion has a parameter, {name}, that fully_shard does not reduce: make the "
                "criterion a part of the model, or freeze it with requires_grad_(False)"
            )
    if engine == "autodiff":
        raise NotImplementedError(
            "engine='autodiff' under fully_shard: double backward would need all parameters at "
            "once; use engine='auto', or train with DistributedDataParallel"
        )
    if not isinstance(weighting, str) and getattr(weighting, "needs_gradients", True):
        raise NotImplementedError(
            f"weighting={weighting!r} under fully_shard: a rule of one's own may ask for sums of "
            "gradients, which are as large as the model; expected 'irw', 'cvar' or 'uniform', or a "
            "rule with needs_gradients=False"
        )
    if accumulation_steps != 1:
        raise NotImplementedError(
            f"accumulation_steps={accumulation_steps} under fully_shard: passes weighed together "
            "would each keep their graph; use accumulation_steps=1, which weighs each pass by "
            "itself and adds them up"
        )


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a sharded model for ``what`` takes a whole one."""
    if is_sharded(model):
        raise NotImplementedError(
            f"{what} is not there for a model under fully_shard: expected a model that is whole, "
            "or one in DistributedDataParallel"
        )


def _check_shards(model: nn.Module) -> None:
    """Refuse parameters that `fully_shard` does not reduce, or not over one dimension."""
    if torch.__version__ < TESTED_FROM:  # it compares as a version
        raise NotImplementedError(
            f"fully_shard with torch {torch.__version__}: expected torch {TESTED_FROM} or newer; "
            "update it, or train with DistributedDataParallel"
        )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise NotImplementedError(
                "model is in DistributedDataParallel and in fully_shard: expected one of them"
            )
        if is_sharded_here(module):
            module.reshard()  # type: ignore[operator]  # a forward leaves the outermost whole
    meshes = set()
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, p in named:
        if not is_shard(p):
            if p.requires_grad:
                raise NotImplementedError(
                    f"{name} is not sharded, and FSDP would not reduce its gradient: expected "
                    "fully_shard(model) on the whole model, after its layers, before the optimizer"
                )
            continue
        if len(p.placements) != 1 or not p.placements[0].is_shard():
            raise NotImplementedError(
                f"{name} is placed as {p.placements}: expected fully_shard over one dimension; "
                "HSDP and tensor parallelism are not supported"
            )
        meshes.add(p.device_mesh)
    if len(meshes) > 1:
        raise NotImplementedError(
            f"the parameters are sharded over {len(meshes)} groups of processes: expected one mesh "
            "for the whole model"
        )
