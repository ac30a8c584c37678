"""Loops on one model that call criterion and backward in other patterns than the usual one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fuzz_nets import TRUNKS, Batch, World, batches
from fuzz_trials import LR, Draw, Trial
from torch import nn

Run = Callable[[Any, Batch], None]
Pattern = Callable[[Draw], tuple[Run, str]]

LOOPS: dict[str, Pattern] = {}
"""By name: draws a loop, and says what was drawn."""


def loop(name: str, loops: dict[str, Pattern] = LOOPS) -> Callable[[Pattern], Pattern]:
    def register(pattern: Pattern) -> Pattern:
        loops[name] = pattern
        return pattern

    return register


def trial(draw: Draw, pattern: Pattern, trunks=tuple(TRUNKS), **options: Any) -> Trial:
    """Any pattern on any trunk."""
    run, story = pattern(draw)
    trunk = draw.pick(*trunks)
    engine = draw.pick("auto", "auto", "auto", "autodiff")
    rule = draw.rule()
    return Trial(
        story=f"{story}; trunk {trunk!r}, engine {engine!r}, {rule}",
        world=partial(World, trunk),
        batch=batches(draw),
        loop=run,
        options={**rule, "engine": engine, **options},
        seed=draw.seed_of_tensors,
        steps=draw.pick(1, 2, 3, 4),
        lr=getattr(run, "lr", LR),
    )


@loop("plain")
def plain(draw):
    how = draw.pick("criterion", "losses", "forwards of parts")
    factor = draw.pick(1.0, 0.5, 1024.0, -1.0)

    def run(user, batch):
        if how == "losses":
            losses = nn.functional.cross_entropy(user.net(batch.x), batch.y, reduction="none")
            return user.of_each(losses * abs(factor))
        out = user.net(batch.x) if how == "criterion" else user.net.a(user.net.trunk(batch.x))
        loss = user.criterion(out, batch.y)
        user.note("value", loss)
        return user.backward(factor * loss)

    run.lr = LR / abs(factor)
    return run, f"{how}, factor {factor}"


@loop("two losses on one graph")
def two_losses(draw):
    factor = draw.pick(1.0, 0.4, -0.5, 3.0)
    how = draw.pick(
        "a sum", "two passes", "the second first", "a plain one", "one target", "detached"
    )
    head = draw.pick("a", "b", "b")

    def run(user, batch):
        h = user.net.trunk(batch.x)
        second = nn.CrossEntropyLoss() if how == "a plain one" else user.criterion
        if how == "detached":
            first = user.criterion(user.net.a(h.detach()), batch.y)
        else:
            first = user.criterion(user.net.a(h), batch.y)
        target = batch.y if how == "one target" else batch.z
        other = factor * second(getattr(user.net, head)(h), target)
        if how == "two passes":
            user.backward(first, retain_graph=True)
            user.backward(other)
        elif how == "the second first":
            user.backward(other, retain_graph=True)
            user.backward(first)
        else:
            user.backward(first + other)

    return run, f"{how}, factor {factor}, head {head}"


@loop("two passes through one loss")
def two_passes(draw):
    times = draw.pick(2, 2, 3)
    between = draw.pick("nothing", "zero_grad", "a forward")

    def run(user, batch):
        loss = user.criterion(user.net(batch.x), batch.y)
        for number in range(times):
            user.backward(loss, retain_graph=number < times - 1)
            if between == "zero_grad" and number == 0:
                user.zero_grad()
            elif between == "a forward":
                user.net(batch.more[0].x)

    return run, f"{times} times, {between} between"


@loop("thrown away")
def thrown_away(draw):
    before = [draw.pick("criterion", "forward", "no_grad", "evaluation", "loss without grad")]
    before += [draw.pick("criterion", "forward", "no_grad")] * draw.pick(0, 1, 3)
    after = draw.pick("nothing", "criterion", "no_grad")

    def wasted(user, kind, batch):
        if kind == "criterion":
            user.note("value", user.criterion(user.net(batch.x), batch.y))
        elif kind == "forward":
            user.net(batch.x)
        elif kind == "no_grad":
            with torch.no_grad():
                user.note("value", user.criterion(user.net(batch.x), batch.y))
        elif kind == "evaluation":
            user.net.eval()
            user.note("value", user.criterion(user.net(batch.x), batch.y))
            user.net.train()
        elif kind == "loss without grad":
            user.criterion(user.net(batch.x).detach(), batch.y)

    def run(user, batch):
        for kind in before:
            wasted(user, kind, batch.more[0])
        loss = user.criterion(user.net(batch.x), batch.y)
        wasted(user, after, batch.more[1])
        user.backward(loss)

    return run, f"before {before}, after {after}"


@loop("parts of a batch")
def parts(draw):
    how = draw.pick(
        "mask", "first half", "both halves", "permuted", "repeated", "every second", "one", "cat"
    )

    def run(user, batch):
        size = len(batch.x)
        if how == "cat":
            more = batch.more[0]
            out, y = user.net(torch.cat([batch.x, more.x])), torch.cat([batch.y, more.y])
            loss = user.criterion(out[:size], y[:size]) + user.criterion(out[size:], y[size:])
            return user.backward(loss)
        out = user.net(batch.x)
        if how == "both halves":
            half = size // 2
            loss = user.criterion(out[:half], batch.y[:half])
            return user.backward(loss + 0.5 * user.criterion(out[half:], batch.y[half:]))
        chosen = {
            "mask": torch.rand(size) < 0.6,
            "first half": slice(0, (size + 1) // 2),
            "permuted": torch.randperm(size),
            "repeated": torch.randint(size, (size + 2,)),
            "every second": slice(0, None, 2),
            "one": slice(1, 2),
        }[how]
        if how == "mask":
            chosen[0] = True
        return user.backward(user.criterion(out[chosen], batch.y[chosen]))

    return run, how


def one_model(draw: Draw, name: str) -> Trial:
    return trial(draw, LOOPS[name])
