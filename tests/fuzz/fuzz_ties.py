"""Equal samples, equal losses, and gradients of zero.

Which of equal losses is in S is for rounding to say; whichever it is, the rest follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fuzz_nets import STEADY, Batch, Net, alone, make_batch
from fuzz_trials import Draw, Trial
from torch import Tensor, nn


def some_twice(batch: Batch, model: nn.Module) -> Batch:
    which = torch.randint(len(batch.x), (len(batch.x),))
    return Batch(batch.x[which], batch.y[which], batch.z)


def pairs(batch: Batch, model: nn.Module) -> Batch:
    which = torch.arange(len(batch.x)).repeat(2)
    return Batch(batch.x[which], batch.y[which], batch.z)


def all_alike(batch: Batch, model: nn.Module) -> Batch:
    which = torch.zeros(len(batch.x), dtype=torch.long)
    return Batch(batch.x[which], batch.y[which], batch.z)


def worst_twice(batch: Batch, model: nn.Module) -> Batch:
    """The largest loss is had by two."""
    model.eval()
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")
    model.train()
    which = torch.arange(len(batch.x))
    which[losses.argmin()] = losses.argmax()
    return Batch(batch.x[which], batch.y[which], batch.z)


def nothing_learnt(batch: Batch, model: nn.Module) -> Batch:
    """A head of zeros: all losses are equal, and no two gradients."""
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.a.bias)
    return batch


def all_dead(batch: Batch, model: nn.Module) -> Batch:
    """The trunk gives nothing, and the head's bias is all there is."""
    nn.init.zeros_(model.a.weight)
    return batch._replace(x=batch.x * 0)


def no_gradient(batch: Batch, model: nn.Module) -> Batch:
    """Every target is met: all scores are zero."""
    nn.init.zeros_(model.a.weight)
    nn.init.zeros_(model.a.bias)
    model.a.bias.data[0] = 800.0
    return batch._replace(y=batch.y * 0)


def one_sample(batch: Batch, model: nn.Module) -> Batch:
    return Batch(batch.x[:1], batch.y[:1], batch.z[:1])


def nobody(batch: Batch, model: nn.Module) -> Batch:
    return Batch(batch.x[:0], batch.y[:0], batch.z[:0])


Kind = Callable[[Batch, nn.Module], Batch]
TIES: dict[str, Kind] = {
    "some twice": some_twice,
    "pairs": pairs,
    "all alike": all_alike,
    "the worst twice": worst_twice,
    "nothing learnt": nothing_learnt,
    "all dead": all_dead,
    "no gradient": no_gradient,
    "one sample": one_sample,
    "nobody": nobody,
}


def tied(draw: Draw, name: str) -> Trial:
    """One kind of equality."""
    trunk = draw.pick(*STEADY)
    engine = draw.pick("auto", "auto", "autodiff")
    rule = draw.rule()
    if name == "one sample":
        rule["center"] = 0.0  # it would subtract all there is
    sizes = [draw.randint(1, 8) for _ in range(3)]
    way = draw.pick("criterion", "losses")

    def run(user: Any, batch: Batch) -> None:
        data = TIES[name](batch, user.net)
        out = user.net(data.x)
        if way == "criterion":
            return user.backward(user.criterion(out, data.y))
        losses: Tensor = nn.functional.cross_entropy(out, data.y, reduction="none")
        return user.of_each(losses)

    return Trial(
        story=f"trunk {trunk!r}, {way}, sizes {sizes}, {engine}, {rule}",
        world=partial(alone, partial(Net, trunk)),
        batch=lambda number: make_batch(sizes[number]),
        loop=run,
        options={**rule, "engine": engine},
        seed=draw.seed_of_tensors,
        steps=draw.pick(1, 2, 3),
    )
