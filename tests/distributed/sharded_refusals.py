"""What is refused of a sharded model, each with a part of the message."""

from __future__ import annotations

from typing import Any

import ranked
import torch
from sharded_loops import Setting
from sharded_trainings import optimizer_for, shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from trainings import FEATURES, mlp

from irw_optim import IRWOptimizer, verify
from irw_optim.schemes import global_weights


def not_finite(rank: int, world_size: int) -> None:
    """On rank 1; both raise, and keep their parameters."""
    s = Setting(rank, world_size)
    s.x[3] = s.x[3] / (1 - rank)
    before = s.parameters()
    try:
        s.step()
    finally:
        assert torch.equal(before, s.parameters())


def uncovered(rank: int, world_size: int) -> None:
    Setting(rank, world_size, "gru").step()


def uncovered_by_ghost(rank: int, world_size: int) -> None:
    """A rank without samples cannot know by itself."""
    Setting(rank, world_size, "gru", "nobody", engine="ghost").step()


def nothing_scored(rank: int, world_size: int) -> None:
    s = Setting(rank, world_size, "frozen", score_parameters=["0.bias"])
    s.model[0].bias.requires_grad_(False)
    s.step()


def batch_statistics(rank: int, world_size: int) -> None:
    Setting(rank, world_size, "batch statistics").step()


def mixing(rank: int, world_size: int) -> None:
    """On rank 1 there is one sample, which shows nothing."""
    Setting(rank, world_size, "mixing", "one sample").step()


def backward_twice(rank: int, world_size: int) -> None:
    setting = Setting(rank, world_size)
    loss = setting.loss()
    loss.backward()
    loss.backward()


def sharded_too_late(rank: int, world_size: int) -> None:
    model = mlp()
    optimizer = optimizer_for(model)
    shard(model)
    losses = nn.functional.cross_entropy(
        model(torch.randn(4, FEATURES)), torch.zeros(4).long(), reduction="none"
    )
    optimizer.backward(losses)


def in_part(rank: int, world_size: int) -> None:
    model = mlp()
    fully_shard(model[0])
    optimizer_for(model)


def replicated(rank: int, world_size: int) -> None:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards")))
    optimizer_for(model)


def also_in_ddp(rank: int, world_size: int) -> None:
    shard(model := mlp())
    optimizer_for(nn.Sequential(model, DistributedDataParallel(mlp())))


def without_the_model(rank: int, world_size: int) -> None:
    shard(model := mlp())
    IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2)


def with_a_learnt_criterion(rank: int, world_size: int) -> None:
    shard(model := mlp())
    criterion = nn.CrossEntropyLoss()
    criterion.temperature = nn.Parameter(torch.ones(()))
    optimizer_for(model, criterion)


class Refused:
    """Arguments of IRWOptimizer; a class, so that it can be sent to the processes."""

    def __init__(self, **irw: Any) -> None:
        self.irw = irw

    def __call__(self, rank: int, world_size: int) -> None:
        shard(model := mlp())
        optimizer_for(model, **self.irw)


def own_rule(losses: Tensor, gradients: Any, worst_off: Tensor) -> Tensor:
    return losses


def verified(rank: int, world_size: int) -> None:
    s = Setting(rank, world_size)
    s.optimizer.detach()
    verify(s.model, s.x, s.y, s.criterion)


def of_a_data_set(rank: int, world_size: int) -> None:
    shard(model := mlp())
    loader = DataLoader(TensorDataset(torch.randn(8, FEATURES), torch.zeros(8).long()), 4)
    global_weights(model, nn.CrossEntropyLoss(), loader, alpha=0.2)


REFUSALS: dict[str, tuple[ranked.Case, str]] = {
    "not finite": (not_finite, "FloatingPointError: the losses or gradients of 1 samples"),
    "uncovered": (uncovered, "they do not cover cells.bias_hh_l0, cells.bias_ih_l0, cells.weight"),
    "batch statistics": (
        batch_statistics,
        "they do not cover 1.bias, 1.weight: choose score_param",
    ),
    "mixing": (mixing, "the ghost products differ from autograd for first.bias, first.weight: "),
    "backward twice": (backward_twice, "RuntimeError: this loss was already backpropagated"),
    "too late": (sharded_too_late, "the losses do not depend on any parameter that makes the sc"),
    "nothing scored": (nothing_scored, "the losses do not depend on any parameter that makes th"),
    "ghost": (uncovered_by_ghost, "they do not cover cells.bias_hh_l0, cells.bias_ih_l0, cells."),
    "in part": (in_part, "NotImplementedError: 2.weight is not sharded, and FSDP would not red"),
    "HSDP": (replicated, "is placed as (Replicate(), Shard(dim=0)): expected fully_shard over one"),
    "in DDP": (also_in_ddp, "NotImplementedError: model is in DistributedDataParallel and in ful"),
    "no model": (without_the_model, "NotImplementedError: the optimizer holds DTensors, and mode"),
    "criterion": (with_a_learnt_criterion, "criterion has a parameter, temperature, that fully_"),
    "autodiff": (Refused(engine="autodiff"), "NotImplementedError: engine='autodiff' under full"),
    "own rule": (Refused(weighting=own_rule), "under fully_shard: a rule of one's own may ask"),
    "compiled": (Refused(compile=True), "which fully_shard goes without: expected compile=False"),
    "logical batch": (Refused(accumulation_steps=2), "accumulation_steps=2 under fully_shard:"),
    "verify": (verified, "NotImplementedError: verify is not there for a model under fully_shard"),
    "data set": (of_a_data_set, "a weight for every sample of a data set is not there for a mod"),
}
