"""Criteria called as users call them: masks, ignored targets, class weights, their own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from fuzz_losses import Losses, expected
from fuzz_nets import CLASSES, STEADY, Net, alone
from fuzz_own_losses import Charbonnier, Dice, Focal, FocalOnTop, Masked, Penalised
from fuzz_trials import Draw, Trial
from torch import Tensor, nn

from irw_optim import PerSampleLoss


class Asked(NamedTuple):
    """A criterion, and what it is called with.

    Attributes:
        criterion: makes it.
        arguments: from the output (B, C) or (B, C, T), in every step the same way.
        per_token: whether outputs are of every position in a sequence.
        trunks: of the model.
        per_sample: its losses; by default those of torch's own.
    """

    criterion: Callable[[], nn.Module]
    arguments: Callable[[Tensor], tuple[Any, ...]]
    per_token: bool = False
    trunks: tuple[str, ...] = STEADY
    per_sample: Callable[..., Losses] = expected


def plain_losses(criterion: nn.Module, *args: Any, **kwargs: Any) -> Losses:
    """Means over each sample's own elements, for a mean or a sum over all elements."""
    unreduced = copy.deepcopy(criterion)
    unreduced.reduction = "none"
    elements = unreduced(*args, **kwargs)
    losses = elements.flatten(1).mean(1) if elements.ndim > 1 else elements
    scale = float(elements.numel()) if criterion.reduction == "sum" else 1.0
    return Losses(losses, losses.mean().detach(), scale, torch.ones(len(losses)), None)


def not_of_samples(criterion: nn.Module, *args: Any) -> Losses:
    raise AssertionError("taken, though its losses are no samples'")


def labels(out: Tensor) -> Tensor:
    return torch.randint(out.shape[1], (len(out), *out.shape[2:]))


def reduction(draw: Draw) -> dict[str, str]:
    return {"reduction": draw.pick("mean", "mean", "sum")}


# By name ------------------------------------------------------------------------------------------


def cross_entropy(draw: Draw) -> Asked:
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64) if draw.flag() else None
    ignore = draw.pick(-100, 1)
    share = draw.pick(0.0, 0.3, 0.6, 1.0)
    options = {"ignore_index": ignore, "label_smoothing": draw.pick(0.0, 0.1), **reduction(draw)}

    def arguments(out):
        y = labels(out)
        return out, y.masked_fill(torch.rand(y.shape) < share, ignore)

    make = partial(nn.CrossEntropyLoss, weight=weight, **options)
    return Asked(make, arguments, draw.flag())


def log_likelihood(draw: Draw) -> Asked:
    def arguments(out):
        y = labels(out)
        return out.log_softmax(1), y.masked_fill(torch.rand(y.shape) < 0.3, -100)

    return Asked(partial(nn.NLLLoss, **reduction(draw)), arguments, draw.flag())


def divergence(draw: Draw) -> Asked:
    make = partial(nn.KLDivLoss, reduction=draw.pick("batchmean", "batchmean", "sum"))
    return Asked(
        make, lambda out: (out.log_softmax(1), torch.randn_like(out).softmax(1)), draw.flag()
    )


def saturated(draw: Draw) -> Asked:
    """Probabilities of 0 and 1 behind BatchNorm."""
    steep = draw.pick(1.0, 20.0, 100.0, 1000.0)

    def arguments(out):
        scaled = (out - out.detach().mean(0)) * steep
        return scaled.sigmoid(), torch.randint(2, out.shape).to(out.dtype)

    trunks = ("batch norm", "batch norm", "linear")
    return Asked(partial(nn.BCELoss, **reduction(draw)), arguments, trunks=trunks)


def bits(draw: Draw) -> Asked:
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64) if draw.flag() else None
    make = partial(nn.BCEWithLogitsLoss, pos_weight=weight, **reduction(draw))
    return Asked(make, lambda out: (out, torch.randint(2, out.shape).to(out.dtype)))


def numbers(draw: Draw) -> Asked:
    kind = draw.pick(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
    make = partial(kind, **reduction(draw))
    if draw.flag(0.3):
        return Asked(make, lambda out: (out[:, 0], torch.rand_like(out[:, 0])))
    return Asked(make, lambda out: (out, torch.rand_like(out)), draw.flag())


def of_three(draw: Draw) -> Asked:
    kind = draw.pick("triplet", "cosine", "ranking", "gaussian")
    made = {
        "triplet": (nn.TripletMarginLoss, lambda o: (o, o.roll(1, 1), torch.randn_like(o))),
        "cosine": (
            nn.CosineEmbeddingLoss,
            lambda o: (o, torch.randn_like(o), torch.randint(2, (len(o),)) * 2 - 1),
        ),
        "ranking": (nn.MarginRankingLoss, lambda o: (o[:, 0], o[:, 1], o[:, 2].detach().sign())),
        "gaussian": (
            nn.GaussianNLLLoss,
            lambda o: (o, torch.randn_like(o), o.square().add(0.1)),
        ),
    }[kind]
    return Asked(partial(made[0], **reduction(draw)), made[1], per_sample=plain_losses)


def margins(draw: Draw) -> Asked:
    return Asked(partial(nn.MultiMarginLoss, **reduction(draw)), lambda out: (out, labels(out)))


def flattened(draw: Draw) -> Asked:
    """Tokens are the samples."""

    def arguments(out):
        rows = out.transpose(1, 2).flatten(0, 1)
        y = labels(rows)
        return rows, y.masked_fill(torch.rand(y.shape) < 0.3, -100)

    return Asked(nn.CrossEntropyLoss, arguments, per_token=True)


def own(draw: Draw) -> Asked:
    kind = draw.pick(Charbonnier, Focal)
    make = partial(kind, **reduction(draw))
    if kind is Focal:
        return Asked(make, lambda out: (out, labels(out)), per_sample=plain_losses)
    return Asked(
        make, lambda out: (out, torch.randn_like(out)), draw.flag(), per_sample=plain_losses
    )


def subclass(draw: Draw) -> Asked:
    return Asked(FocalOnTop, lambda out: (out, labels(out)), per_sample=plain_losses)


def wrapped(draw: Draw) -> Asked:
    def cubes(out, target):
        return (out - target).abs() ** 3

    make = partial(PerSampleLoss, cubes, **reduction(draw))
    return Asked(
        make, lambda out: (out, torch.randn_like(out)), draw.flag(), per_sample=plain_losses
    )


def masked(draw: Draw) -> Asked:
    """Without padding it is a mean of elements; with it, not."""
    padded_from = draw.pick(0, 1, 2, 100)
    calls = {"count": 0}

    def arguments(out):
        padded = calls["count"] // 2 >= padded_from
        calls["count"] += 1
        mask = (torch.rand_like(out) < 0.5).to(out.dtype) if padded else torch.ones_like(out)
        mask[0] = 1
        return out, torch.randn_like(out), mask

    return Asked(Masked, arguments, per_sample=plain_losses)


def dice(draw: Draw) -> Asked:
    return Asked(partial(Dice, False), lambda out: (out, labels(out)), per_sample=plain_losses)


def dice_of_the_batch(draw: Draw) -> Asked:
    return Asked(partial(Dice, True), lambda out: (out, labels(out)), per_sample=not_of_samples)


def penalised(draw: Draw) -> Asked:
    return Asked(Penalised, lambda out: (out, torch.randn_like(out)), per_sample=not_of_samples)


CRITERIA: dict[str, Callable[[Draw], Asked]] = {
    "cross entropy": cross_entropy,
    "likelihood": log_likelihood,
    "divergence": divergence,
    "saturated": saturated,
    "bits": bits,
    "numbers": numbers,
    "of three": of_three,
    "margins": margins,
    "flattened": flattened,
    "own": own,
    "subclass": subclass,
    "wrapped": wrapped,
    "masked": masked,
    "dice": dice,
    "dice of the batch": dice_of_the_batch,
    "penalised": penalised,
}

REFUSED = ("dice of the batch", "penalised")
"""Those that no sample has a part of: only a refusal is right."""


class PerToken(nn.Module):
    """The net at every position: (B, T, d) to (B, C, T)."""

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.net = Net(trunk)

    def forward(self, x):
        return self.net(x).transpose(1, 2)


def asked(draw: Draw, name: str) -> Trial:
    """One kind of criterion."""
    made = CRITERIA[name](draw)
    trunk = draw.pick(*made.trunks)
    engine = draw.pick("auto", "auto", "autodiff")
    rule = draw.rule()
    sizes = [draw.pick(2, 3, 3, 4, 7) for _ in range(4)]
    lengths = [draw.pick(1, 2, 3, 4) for _ in range(4)] if made.per_token else None
    keywords = draw.flag(0.3) and name in ("cross entropy", "numbers", "margins", "flattened")

    def batch(number: int) -> Tensor:
        inner = () if lengths is None else (lengths[number],)
        return torch.randn(sizes[number], *inner, 4, dtype=torch.float64)

    def run(user: Any, x: Tensor) -> None:
        out = user.net(x)
        if keywords:
            input, target = made.arguments(out)
            loss = user.criterion(input=input, target=target)
        else:
            loss = user.criterion(*made.arguments(out))
        user.note("value", loss)
        user.backward(loss)

    net = PerToken if made.per_token else Net
    return Trial(
        story=f"{made.criterion}, trunk {trunk!r}, sizes {sizes}, lengths {lengths}, "
        f"keywords {keywords}, {engine}, {rule}",
        world=partial(alone, partial(net, trunk)),
        batch=batch,
        loop=run,
        criterion=made.criterion,
        per_sample=made.per_sample,
        options={**rule, "engine": engine},
        seed=draw.seed_of_tensors,
        steps=draw.pick(1, 2, 3, 4),
    )
