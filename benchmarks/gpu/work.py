"""What is measured: models, the settings that people train them in, and ways to take a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cost.neighbours import ALPHA, METHODS, Step
from benchmarks.models import TABLE, Work
from benchmarks.zoo.entry import Entry
from benchmarks.zoo.measuring import Loop
from benchmarks.zoo.registry import named

OURS = "ours, ghost"
EVERYBODY = ("plain", OURS, "Opacus hooks", "torch.func")
METHODS_OF = {"eager": EVERYBODY, "autocast": EVERYBODY[:3], "compiled": EVERYBODY[:2]}
"""By setting; what torch.compile makes has no rows for others to take."""

ZOO = ("nanoGPT", "ViT, class token", "ResNet-18", "ConvNeXt", "BERT", "Llama", "LSTM", "LoRA")
"""Measured eager, against a plain step."""

Makers = Mapping[str, Callable[[], Step]]
"""By method, what makes its step."""


class InAutocast(nn.Module):
    """A model whose forward runs in bfloat16 where autocast has it so; its output is float32."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device.type

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.model(x).float()


@dataclass(frozen=True)
class Row:
    """One model in one setting.

    Attributes:
        work: the model's name.
        setting: eager, autocast or compiled.
        makers: the ways to take a step, plain first.
    """

    work: str
    setting: str
    makers: Makers


def rows(device: torch.device) -> Iterator[Row]:
    """All that is measured, what matters most first."""
    for setting in ("eager", "autocast"):
        for work in TABLE:
            yield Row(work.name, setting, _ways(work, setting, device))
    for name in ZOO:
        yield Row(name, "eager", _of_the_zoo(named(name), device))
    for work in TABLE[-2:]:  # a compiler takes long
        yield Row(work.name, "compiled", _ways(work, "compiled", device))


def _ways(work: Work, setting: str, device: torch.device) -> Makers:
    def maker(method: str) -> Callable[[], Step]:
        def make() -> Step:
            x, y = (t.to(device) for t in work.batch())
            model = work.build().to(device)
            if setting == "autocast":
                model = InAutocast(model, device)
            if setting == "compiled":
                model.compile()
            return METHODS[method](model, x, y)

        return make

    return {method: maker(method) for method in METHODS_OF[setting]}


def _of_the_zoo(entry: Entry, device: torch.device) -> Makers:
    def maker(alpha: float | None) -> Callable[[], Step]:
        def make() -> Step:
            inputs, target = entry.draw()
            batch = (tuple(t.to(device) for t in inputs), target.to(device))
            return Loop.of(entry, entry.make().to(device), batch, alpha).step

        return make

    return {"plain": maker(None), OURS: maker(ALPHA)}
