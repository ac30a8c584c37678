"""Loops that bite, over a sharded model: in one process and in two they come to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ranked
import torch
from sharded_trainings import optimizer_for, shard
from torch import Tensor, nn
from trainings import MODELS, data, whole

from irw_optim import IRWOptimizer

SIZES = {"usual": [20, 17], "one sample": [36, 1], "nobody": [37, 0], "nobody first": [0, 37]}


class Setting:
    """A model, an optimizer and this rank's part of the data; all of it where there is one rank."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        model: str = "mlp",
        sizes: str = "usual",
        dtype: torch.dtype = torch.float64,
        fsdp: dict[str, Any] | None = None,
        **irw: Any,
    ) -> None:
        torch.manual_seed(0)
        self.ranks = world_size
        self.model = MODELS[model]().to(dtype)
        x, y = data()
        shards = [part.tensor_split(2) for part in torch.arange(len(x)).split(SIZES[sizes])]
        passes = [torch.cat(part) for part in zip(*shards, strict=True)]
        if world_size > 1:
            passes = shards[rank]
        if world_size > 1 or fsdp:
            shard(self.model, **(fsdp or {}))
        self.batches = [(x[part].to(dtype), y[part]) for part in passes]
        self.x, self.y = (torch.cat(tensors) for tensors in zip(*self.batches, strict=True))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optimizer_for(self.model, self.criterion, **irw)

    def loss(self, number: int | None = None) -> Tensor:
        """Of one of two batches, or of both together."""
        x, y = (self.x, self.y) if number is None else self.batches[number]
        return self.criterion(self.model(x), y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def parameters(self) -> Tensor:
        return torch.cat([whole(p).flatten() for p in self.model.parameters()])


def in_one_pass(s: Setting) -> None:
    s.loss().backward()


def with_another_term(s: Setting) -> None:
    """A sum over all samples, of which every rank has its own and FSDP takes the average."""
    output = s.model(s.x)
    (s.criterion(output, s.y) + 0.01 * s.ranks * output.square().sum()).backward()


def twice_through_one_graph(s: Setting) -> None:
    loss = s.loss()
    loss.backward(retain_graph=True)
    loss.backward()


def two_forwards_before_one_backward(s: Setting) -> None:
    (s.loss(0) + 0.5 * s.loss(1)).backward()


def two_forwards_before_two_backwards(s: Setting) -> None:
    first, second = s.loss(0), s.loss(1)
    second.backward()
    first.backward()


def reduced_in_the_last_pass(s: Setting) -> None:
    sync = getattr(s.model, "set_requires_gradient_sync", lambda _: None)
    sync(False)
    s.loss(0).backward()
    sync(True)
    s.loss(1).backward()


def clipped(s: Setting) -> None:
    s.loss().backward()
    norm: Any = torch.nn.utils.clip_grad_norm_(s.model.parameters(), 0.05)
    assert float(norm) > 0.05


def scaled(s: Setting) -> None:
    (1024.0 * s.loss()).backward()
    for p in s.model.parameters():
        p.grad /= 1024.0


def evaluate(s: Setting) -> None:
    s.model.eval()
    with torch.no_grad():
        s.loss()
    s.model.train()


def after_an_evaluation(s: Setting) -> None:
    evaluate(s)
    s.loss().backward()


def made_after_an_evaluation(s: Setting) -> None:
    """A forward leaves the outermost parameters whole, of which one joins the optimizer later."""
    if s.optimizer.steps == 0:
        s.optimizer.detach()
        everything = list(s.model.parameters())
        inner = torch.optim.SGD(everything[1:], lr=0.3, momentum=0.9)
        evaluate(s)
        s.optimizer = IRWOptimizer(inner, alpha=0.2, model=s.model, criterion=s.criterion)
        evaluate(s)
        s.optimizer.add_param_group({"params": everything[:1]})
    s.loss().backward()


class Loop:
    """A class, so that it can be sent to the processes."""

    def __init__(self, loop: Callable[[Setting], None], **setting: Any) -> None:
        self.loop = loop
        self.setting = setting

    def __call__(self, rank: int, world_size: int) -> Tensor:
        s = Setting(rank, world_size, **self.setting)
        for _ in range(3):
            s.optimizer.zero_grad()
            self.loop(s)
            s.optimizer.step()
        return s.parameters()


LOOPS: dict[str, ranked.Case] = {
    loop.__name__: Loop(loop)
    for loop in (
        with_another_term,
        twice_through_one_graph,
        two_forwards_before_one_backward,
        two_forwards_before_two_backwards,
        reduced_in_the_last_pass,
        clipped,
        scaled,
        after_an_evaluation,
    )
}
LOOPS |= {
    f"{model}, {sizes}": Loop(in_one_pass, model=model, sizes=sizes)
    for model in ("mlp", "time first")
    for sizes in SIZES
    if sizes != "usual"
}
LOOPS["made after an evaluation"] = Loop(made_after_an_evaluation, model="transformer")
LOOPS["checkpointed"] = Loop(in_one_pass, model="checkpointed")
LOOPS["float32"] = Loop(in_one_pass, dtype=torch.float32)
