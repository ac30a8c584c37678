"""Several optimizers on one model, and optimizers over a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fuzz_loops import Pattern, loop
from fuzz_nets import TRUNKS, World, batches
from fuzz_trials import Draw, Trial
from torch import Tensor, nn

OPTIMIZERS: dict[str, Pattern] = {}

PARTS: dict[str, Callable[[nn.Module], Sequence[Tensor]]] = {
    "trunk": lambda net: list(net.trunk.parameters()),
    "head": lambda net: list(net.a.parameters()),
    "biases": lambda net: [p for n, p in net.named_parameters() if n.endswith("bias")],
    "all": lambda net: list(net.parameters()),
}


@loop("over a part", OPTIMIZERS)
def over_a_part(draw):
    rest = draw.pick("nothing", "a plain optimizer", "frozen")

    def run(user, batch):
        owned = {id(p) for p in user.owned}
        others = [p for p in user.net.parameters() if id(p) not in owned]
        for p in others:
            p.requires_grad_(rest != "frozen")
        user.backward(user.criterion(user.net(batch.x), batch.y))
        if rest == "a plain optimizer" and others:
            torch.optim.SGD(others, lr=0.05).step()

    return run, rest


@loop("two in turn", OPTIMIZERS)
def two_in_turn(draw):
    clear = draw.pick("own", "net")
    way = draw.pick("criterion", "losses")

    def run(user, batch):
        other, more = user.other, batch.more[0]
        user.backward(user.criterion(user.net(batch.x), batch.y))
        user.note_gradients(user.net)
        user.step()
        if clear == "net":
            user.net.zero_grad()
        else:
            user.zero_grad()
            for p in user.net.parameters():
                p.grad = None
        out = user.net(more.x)
        if way == "losses":
            other.of_each(nn.functional.cross_entropy(out, more.y, reduction="none"))
        else:
            other.backward(other.criterion(out, more.y))
        user.note_gradients(user.net)
        other.step()

    return run, f"{way}, cleared {clear}"


@loop("two at once", OPTIMIZERS)
def two_at_once(draw):
    graph = draw.pick("one graph", "two graphs")

    def run(user, batch):
        h = user.net.trunk(batch.x)
        first = user.criterion(user.net.a(h), batch.y)
        h = user.net.trunk(batch.x) if graph == "two graphs" else h
        second = user.other.criterion(user.net.b(h), batch.z)
        user.backward(first + 0.5 * second)

    return run, graph


def optimizers(draw: Draw, name: str) -> Trial:
    run, story = OPTIMIZERS[name](draw)
    trunk = draw.pick(*TRUNKS)
    mine, theirs = draw.pick(*PARTS), draw.pick("trunk", "biases", "all")  # the other has head b
    engine = draw.pick("auto", "auto", "autodiff")
    rule = draw.rule()
    second: dict[str, Any] | None = None
    if name != "over a part":
        second = {**draw.rule(), "engine": draw.pick("auto", "autodiff")}
    return Trial(
        story=f"{story}; trunk {trunk!r}, parts {mine!r}, {theirs!r}, {engine}, {rule}, {second}",
        world=partial(World, trunk),
        batch=batches(draw),
        loop=run,
        options={**rule, "engine": engine},
        seed=draw.seed_of_tensors,
        steps=draw.pick(1, 2, 3),
        owned=PARTS[mine],
        second=second,
        owned_by_second=PARTS[theirs],
        compared=("scores", "weights", "gradients") if second is None else ("gradients",),
    )
