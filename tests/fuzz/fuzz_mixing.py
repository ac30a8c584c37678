"""Forwards in which a random few samples see each other, always, from some step on, or at times."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_hidden import HIDDEN, LAYERS
from fuzz_nets import CLASSES, WIDTH, Batch, alone, make_batch
from fuzz_operations import MIXINGS, Few, Mixing
from fuzz_trials import Draw, Trial
from torch import Tensor, nn

OPERATIONS: dict[str, Mixing] = {**MIXINGS, **HIDDEN}
KINDS = (*OPERATIONS, *LAYERS)

BEGINS = {
    "always": 2,
    "from 2": 3,
    "from 4": 5,
    "unseen from 2": 3,
    "unseen from 4": 5,
    "at times": 6,
    "of a batch": 4,
}
"""When samples start to mix, and how many steps are taken; the first is 0. The graph has no new
operation where that is unseen: until then, the few samples are nobody."""


class Mixer(nn.Module):
    """The operation, when it is on."""

    def __init__(self, mixing: str, changed: int, width: int) -> None:
        super().__init__()
        self.mixing = OPERATIONS.get(mixing)
        self.layer = LAYERS[mixing](width) if mixing in LAYERS else None
        self.changed, self.now = changed, "on"

    def forward(self, h):
        if self.now == "off":
            return h
        rows = h.reshape(len(h), -1)
        if self.layer is not None:
            return self.layer(rows).view_as(h)
        few = Few(len(h), self.changed if self.now == "on" else 0)
        return self.mixing(rows, few).view_as(h)


class Mixed(nn.Module):
    """Parameters before and after the mixing; of sequences, for ``length`` > 0."""

    def __init__(self, mixing: str, changed: int, where: str, length: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        self.a = nn.Linear(WIDTH, CLASSES)
        features = CLASSES if where == "output" else WIDTH * max(1, length)
        self.mixer, self.where, self.length = Mixer(mixing, changed, features), where, length

    def mixed_at(self, place: str, h: Tensor) -> Tensor:
        return self.mixer(h) if self.where == place else h

    def forward(self, x):
        x = x[:, None] * torch.linspace(0.5, 1, self.length)[:, None].to(x) if self.length else x
        h = self.mixed_at("first", self.first(self.mixed_at("input", x)))
        h = self.mixed_at("second", self.second(h))
        return self.mixed_at("output", self.a(h.mean(1) if self.length else h))


def state(begins: str, number: int, batch: Batch) -> str:
    """``"on"``, ``"unseen"`` or ``"off"``."""
    if begins == "always":
        return "on"
    if begins == "at times":
        return "on" if number % 3 == 2 else "off"
    if begins == "of a batch":
        return "on" if batch.x[0, 0] > 0 else "off"
    *unseen, _, first = begins.split()
    return "on" if number >= int(first) else (unseen or ["off"])[0]


def mixing(draw: Draw, name: str) -> Trial:
    """One operation somewhere in a forward."""
    where = draw.pick("input", "first", "first", "second", "output")
    if name in LAYERS and where == "output":
        where = "second"
    changed, length = draw.pick(1, 1, 2, 3), draw.pick(0, 0, 0, 3)
    begins, way = draw.pick(*BEGINS), draw.pick("criterion", "losses", "contrast")
    sizes = [draw.randint(3, 8)] if draw.flag() else [draw.randint(1, 8) for _ in range(8)]
    engine = draw.pick("auto", "auto", "auto", "auto", "autodiff", "ghost")
    rule = draw.rule()

    def batch(number: int) -> tuple[int, Batch]:
        return number, make_batch(sizes[number % len(sizes)])

    def run(user: Any, numbered: tuple[int, Batch]) -> None:
        number, batch = numbered
        user.net.mixer.now = state(begins, number, batch)
        out = user.net(batch.x)
        if way == "criterion":
            return user.backward(user.criterion(out, batch.y))
        if way == "contrast":  # the other samples are the classes
            return user.backward(user.criterion(out @ out.detach().T, torch.arange(len(out))))
        losses = F.cross_entropy(out, batch.y, reduction="none")
        return user.of_each(losses)

    return Trial(
        story=f"{name} at {where}, {begins}, of {changed}; {way}, sizes {sizes}, {engine}, {rule}",
        world=partial(alone, partial(Mixed, name, changed, where, length)),
        batch=batch,
        loop=run,
        options={**rule, "engine": engine},
        seed=draw.seed_of_tensors,
        steps=BEGINS[begins],
    )
