"""What is measured: models, the settings that people train them in, and ways to take a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cost.neighbours import ALPHA, Step
from benchmarks.cost.steps import Makers, makers
from benchmarks.models import TABLE
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.measuring import Loop
from benchmarks.zoo.registry import named

OURS = "ours, ghost"
EVERYBODY = ("plain", OURS, "Opacus hooks", "torch.func")
ZOO = ("nanoGPT", "ViT, class token", "ResNet-18", "ConvNeXt", "BERT", "Llama", "LSTM", "LoRA")
"""Measured eager, against a plain step."""


class InAutocast(nn.Module):
    """A model whose forward runs in bfloat16 where autocast has it so; its output is float32."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.model(x).float()


class Row(NamedTuple):
    """A model's name, its setting (eager, autocast or compiled), and ways to step, plain first."""

    work: str
    setting: str
    makers: Makers


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def rows(device: torch.device) -> Iterator[Row]:
    """All that is measured, what matters most first."""
    for work in TABLE:
        yield Row(work.name, "eager", makers(work, EVERYBODY, device))
    in_autocast = partial(InAutocast, device=device)
    for work in TABLE:
        yield Row(work.name, "autocast", makers(work, EVERYBODY[:3], device, in_autocast))
    for name in ZOO:
        yield Row(name, "eager", _of_the_zoo(named(name), device))
    for work in TABLE[-2:]:  # a compiler takes long, and leaves no rows for others to take
        yield Row(work.name, "compiled", makers(work, EVERYBODY[:2], device, _compiled))


def _of_the_zoo(entry: Entry, device: torch.device) -> Makers:
    def maker(alpha: float | None) -> Callable[[], Step]:
        def make() -> Step:
            inputs, target = entry.draw()
            batch = (tuple(t.to(device) for t in inputs), target.to(device))
            return Loop.of(entry, entry.make().to(device), batch, alpha).step

        return make

    return {"plain": maker(None), OURS: maker(ALPHA)}
