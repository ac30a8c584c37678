"""The loop by plain autograd: a criterion whose loss has the weighted gradient, by construction.

Its loss is

    the criterion's own value + sum_p <weighted_p - plain_p, p>, less the second term's value,

a plain scalar with the value and the gradients of the ordinary loss, but for the gradients of the
model's parameters, which are those of sum_i w_i loss_i. The weights come from `reference`, and G
from one backward pass for each sample. So whatever a loop does with it is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import reference
import torch
from fuzz_losses import Losses
from fuzz_sides import User
from torch import Tensor, nn

SAME_LOSS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative difference of losses under which rounding decides which of them is in S."""


class Call(NamedTuple):
    """One batch of losses, and what is decided for it.

    Attributes:
        losses: (B,).
        G: (B, P), float64.
        scale: length of the ordinary gradient.
        removed: samples that are ignored.
    """

    losses: Tensor
    G: Tensor
    scale: float
    removed: set[int]


class Decided(NamedTuple):
    """The rule's answer for one batch.

    Attributes:
        decision: S, scores and weights.
        unit: of the scores: the longest gradient times the length of g_S.
        blown_up: how much larger than a score's the relative error of a weight may be.
        tied: whether other choices of S are as right, and give other weights.
    """

    decision: reference.Decision
    unit: float
    blown_up: float
    tied: bool


class Loop(User):
    """By plain autograd.

    Args:
        world: all networks.
        per_sample: from the criterion's arguments to its per-sample losses.
        value: the criterion itself.
        owned: the parameters whose gradients make the scores.
        lr: of the plain step.
        alpha, center, mix: of the rule.
        accumulation_steps: losses that are weighed together, once they went backward.
        options: of the library, with no meaning here.

    Attributes:
        least: a gradient that is shorter is what rounding left, and so are its scores.
    """

    def __init__(
        self,
        world: nn.Module,
        per_sample: Callable[..., Losses],
        value: Callable[..., Tensor],
        owned: Sequence[Tensor],
        lr: float,
        *,
        alpha: float,
        center: float = 0.0,
        mix: float = 0.0,
        accumulation_steps: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(world)
        self.per_sample, self.value = per_sample, value
        self.owned, self.lr = list(owned), lr
        self.rule = {"alpha": alpha, "center": center, "mix": mix}
        self.passes = accumulation_steps
        self.least = 1e-12
        self.clear()

    def follow(self, record: Any, by_link: bool) -> None:
        """Take S from a record where several are right, and with ``by_link`` the weights too."""
        self.preferred = None if record is None else record.worst_off
        self.given = record.weights.double() if by_link and record is not None else None

    def begin(self) -> None:
        super().begin()
        self.clear()

    def clear(self) -> None:
        self.preferred: Tensor | None = None
        self.given: Tensor | None = None
        self.waiting: list[tuple[Call, float]] = []
        self.arrived = 0
        self.decided: list[Decided] = []
        self.length = 0.0

    @property
    def all_decided(self) -> list[Decided]:
        """The other optimizer's too."""
        return self.decided + (self.other.decided if self.other else [])

    @property
    def all_length(self) -> float:
        """How long gradients may be that were added up; the other optimizer's too."""
        return self.length + (self.other.length if self.other else 0.0)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.net.parameters() if p.requires_grad]

    def criterion(self, *args: Any, **kwargs: Any) -> Tensor:
        """The ordinary value; the model's parameters get the weighted gradient."""
        value = self.value(*args, **kwargs)
        if not (torch.is_grad_enabled() and self.net.training and value.requires_grad):
            return value
        return self.carrying(value, self.per_sample(*args, **kwargs))

    def of_each(self, losses: Tensor) -> None:
        size = len(losses)
        every = Losses(losses, losses.detach().mean(), 1.0, torch.ones(size), None)
        self.backward(self.carrying(losses.mean(), every))

    def carrying(self, value: Tensor, batch: Losses) -> Tensor:
        parameters = self.parameters
        self.measuring = True
        plain = gradients_of(value, parameters)
        if all(g is None for g in plain):
            self.measuring = False
            return value  # none of the model's business
        ordinary = torch.cat([flat(p, g) for p, g in zip(parameters, plain, strict=True)])
        G = rows_of(batch.losses, parameters)
        self.measuring = False
        call = Call(batch.losses.detach(), G, batch.scale, ignored(batch))
        wanted = torch.zeros_like(ordinary)
        if self.passes == 1:
            decided = self.decide([call])
            wanted = call.scale * (decided.decision.weights @ call.G)
            self.decided.append(decided)
        by_hand = inner_product(parameters, wanted - ordinary)
        loss = value + (by_hand - by_hand.detach()).to(value.dtype)
        loss.register_hook(lambda factor: self.arrives(call, float(factor)))
        return loss

    def arrives(self, call: Call, factor: float) -> None:
        """A backward pass has come to a loss."""
        self.waiting.append((call, factor))
        self.arrived += 1
        worst = self.decided[-1].blown_up if self.decided else 1.0
        lengths = call.G.norm(dim=1).sum()
        self.length += abs(factor * call.scale) * float(lengths) * (1 + worst)

    def backward(self, loss: Tensor, **how: Any) -> None:
        loss.backward(**how)
        while self.passes > 1 and len(self.waiting) >= self.passes:
            self.weigh(self.waiting[: self.passes])
            self.waiting = self.waiting[self.passes :]

    def finish(self) -> None:
        """Weigh what is left of a logical batch."""
        if self.passes > 1 and self.waiting:
            self.weigh(self.waiting)
            self.waiting = []

    def weigh(self, arrived: list[tuple[Call, float]]) -> None:
        """The gradient of a logical batch."""
        calls = [call for call, _ in arrived]
        decided = self.decide(calls)
        self.decided.append(decided)
        self.length *= 1 + decided.blown_up
        length = sum(factor * call.scale for call, factor in arrived)
        total = length * (decided.decision.weights @ torch.cat([call.G for call in calls]))
        inner_product(self.parameters, total).backward()

    def zero_grad(self, **how: Any) -> None:
        for p in self.owned:
            p.grad = None

    def step(self) -> None:
        self.finish()
        with torch.no_grad():
            for p in self.owned:
                if p.grad is not None:
                    p -= self.lr * p.grad

    def decide(self, calls: Sequence[Call]) -> Decided:
        losses = torch.cat([call.losses for call in calls]).double()
        first, removed = 0, set()
        for call in calls:
            removed |= {first + i for i in call.removed}
            first += len(call.losses)
        owned = {id(p) for p in self.owned}
        columns = [torch.full((numbers(p),), id(p) in owned) for p in self.parameters]
        rows = torch.cat([call.G for call in calls])[:, torch.cat(columns)]
        if len(removed) == len(losses):
            removed = set()
        kept = [i for i in range(len(losses)) if i not in removed]
        if not kept:
            nobody = reference.decide(losses, rows, self.rule["alpha"])
            return Decided(nobody, 0.0, 0.0, False)

        chosen, tied = self.choice(losses[kept], rows[kept], calls[0].losses.dtype, kept)
        as_losses = losses if chosen is None else chosen.double()
        decision = reference.decide(as_losses, rows, removed=removed, **self.rule)
        lengths = rows.norm(dim=1)
        centre = 1 + self.rule["center"]
        unit = float(lengths.max() * lengths[decision.worst_off].sum()) * centre
        mass = float(decision.scores.clamp(min=0).sum())
        blown_up = len(losses) * unit / mass if mass else (float("inf") if unit else 1.0)
        longest, of_S = float(lengths.max()), float(lengths[decision.worst_off].sum())
        tied = tied or 0 < longest < self.least or 0 < of_S < 1e-12 * longest
        if self.given is not None and len(self.given) == len(losses):
            decision, blown_up = decision._replace(weights=self.given), 0.0
        return Decided(decision, unit, blown_up, tied)

    def choice(self, losses, rows, dtype, kept) -> tuple[Tensor | None, bool]:
        """Where losses tie for S: the choice that the library made, if it is a right one."""
        S = reference.worst_off(losses.tolist(), self.rule["alpha"])
        nearly = SAME_LOSS[dtype] * float(losses.abs().max())
        last = float(losses[S].min())
        among = (losses - last).abs() <= nearly
        if len(S) == len(losses) or among.sum() <= sum(bool(among[i]) for i in S):
            return None, False
        theirs = self.preferred
        if theirs is not None and len(theirs) >= len(losses) and int(theirs.sum()) == len(S):
            mask = theirs[kept]
            above = losses > last + nearly
            if bool(mask[above].all()) and bool((losses[mask] >= last - nearly).all()):
                return theirs, False
        alike = rows[among]
        spread = float((alike - alike[:1]).abs().max())
        return None, spread > 1e-9 * float(rows.abs().max())


# G ------------------------------------------------------------------------------------------------


def gradients_of(value: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not parameters:
        return []
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


def flat(p: Tensor, gradient: Tensor | None) -> Tensor:
    """As float64 numbers; a complex one is two of them."""
    if gradient is None:
        return torch.zeros(numbers(p), dtype=torch.float64)
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return (
        (torch.view_as_real(dense.resolve_conj()) if p.is_complex() else dense).flatten().double()
    )


def numbers(p: Tensor) -> int:
    return p.numel() * (2 if p.is_complex() else 1)


def rows_of(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """G (B, P): one backward pass for each loss."""
    rows = [
        torch.cat(
            [flat(p, g) for p, g in zip(parameters, gradients_of(loss, parameters), strict=True)]
        )
        for loss in losses
    ]
    return torch.stack(rows) if rows else torch.zeros(0, sum(map(numbers, parameters))).double()


def inner_product(parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """<vector, parameters>, whose gradient is the vector."""
    parts = vector.split([numbers(p) for p in parameters])
    total = torch.zeros((), dtype=torch.float64)
    for p, part in zip(parameters, parts, strict=True):
        real = torch.view_as_real(p) if p.is_complex() else p
        total = total + (real * part.view_as(real).to(real.dtype)).sum()
    return total


def ignored(batch: Losses) -> set[int]:
    return set((batch.counts == 0).nonzero().flatten().tolist())
