"""Refuses what would not be exact on sharded parameters, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.processes import is_shard, is_sharded, is_sharded_here

TESTED_FROM = "2.13"
"""The torch from which on FSDP's own tables are those that are read here."""


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
    check_shards(model)
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
    """Refuse a sharded model.

    Args:
        model: to be looked at.
        what: cannot be done with it.

    Raises:
        NotImplementedError: it is one.
    """
    if is_sharded(model):
        raise NotImplementedError(
            f"{what} is not there for a model under fully_shard: expected a model that is whole, "
            "or one in DistributedDataParallel"
        )


def check_shards(model: nn.Module) -> None:
    """Refuse parameters that `fully_shard` does not reduce, or not over one dimension.

    Raises:
        NotImplementedError: naming the parameter; or a torch with another FSDP inside.
    """
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
