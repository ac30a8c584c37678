"""A trial: a world of networks, batches, and a loop that runs on both sides, step by step.

All of a trial follows from its family and its seed. What fails says so in one line that runs it
again alone.
"""

from __future__ import annotations

import copy
import random
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fuzz_losses import Losses, expected
from fuzz_oracle import Loop
from fuzz_sides import Ours, User
from torch import Tensor, nn

import irw_optim

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4, torch.bfloat16: 5e-2}

LR = 0.05

REFUSALS = (
    r'use engine="auto"',
    r"use the operation that is not in place",
    r"retain_graph=True",
    r"create_graph",
    r"use_reentrant=False",
    r"PerSampleLoss\(",
    r"call\s+optimizer\.backward\(losses",
    r"call detach\(\)",
    r"return one loss per sample",
)
"""Words of the library's own refusals that tell how to mend what is refused."""


class Draw(random.Random):
    """Choices that follow from a family and a seed."""

    def __new__(cls, *_: object) -> Draw:
        return super().__new__(cls)  # Python 3.10 takes at most one argument here

    def __init__(self, family: str, seed: int) -> None:
        super().__init__(f"{family} {seed}")
        self.seed_of_tensors = self.randrange(2**31)

    def pick(self, *values: Any) -> Any:
        return self.choice(values)

    def flag(self, chance: float = 0.5) -> bool:
        return self.random() < chance

    def rule(self) -> dict[str, Any]:
        """Options of the optimizer that the loop follows too."""
        return {
            "alpha": self.pick(0.05, 0.3, 0.3, 0.5),
            "center": self.pick(0.0, 0.0, 0.0, 1.0),
            "mix": self.pick(0.0, 0.0, 0.0, 0.25),
        }


@dataclass
class Trial:
    """What is built, what runs, and what it may end in.

    Attributes:
        story: what was drawn, in words.
        world: makes all networks; a module with an attribute ``model``.
        batch: makes the batch of a step.
        loop: what a step does with them.
        options: of the optimizer.
        criterion: makes the criterion that is attached.
        per_sample: from a criterion and its arguments to the losses of the samples.
        steps: how many.
        lr: of the plain step.
        seed: of all tensors.
        dtype: of the world; ``exact`` is that of the loop's, if it is another.
        owned: picks the parameters that the optimizer has; None for all of the model's.
        second: options of a second optimizer on the same model, with a criterion of its own.
        owned_by_second: the parameters that this one has.
        compared: of the record and beside it.
        by_link: compare the scores with the loop's, the weights with what the rule makes of these
            scores, and the gradients with these weights': where rounding is coarse.
    """

    story: str
    world: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loop: Callable[[User, Any], None]
    options: dict[str, Any]
    seed: int
    steps: int = 2
    lr: float = LR
    criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss
    per_sample: Callable[..., Losses] = expected
    dtype: torch.dtype = torch.float64
    exact: torch.dtype | None = None
    tolerance: float | None = None
    owned: Callable[[nn.Module], Sequence[Tensor]] | None = None
    second: dict[str, Any] | None = None
    owned_by_second: Callable[[nn.Module], Sequence[Tensor]] | None = None
    compared: tuple[str, ...] = ("scores", "weights", "gradients")
    by_link: bool = False

    def __call__(self) -> str:
        """Every step equals the loop.

        Returns:
            "exact"; "refused" where the library refused by name; "tied" where rounding decides.
        """
        ours, loop = self.sides()
        tolerance = self.tolerance or TOLERANCE[self.dtype]
        compared = 0
        for number in range(self.steps):
            twin_of(ours, loop)
            try:
                self.run(ours, number)
            except Exception as error:
                if is_refusal(error):
                    return "refused"
                raise
            loop.follow(ours.optimizer.last_step, self.by_link)
            self.run(loop, number)
            blown_up = max((decided.blown_up for decided in loop.all_decided), default=0.0)
            if (
                not any(decided.tied for decided in loop.all_decided)
                and blown_up * tolerance < 0.05
            ):
                agree(ours, loop, tolerance, self.compared)
                compared += 1
            if not ours.stepped and any(p.grad is not None and p.grad.any() for p in loop.owned):
                ours.step()
            if not all(p.isfinite().all() for p in ours.net.parameters()):
                break  # it diverged, as it may
        for side in (ours, ours.other):
            if side is not None:
                side.optimizer.detach()
        return "exact" if compared else "tied"

    def sides(self) -> tuple[Ours, Loop]:
        torch.manual_seed(self.seed)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            world, criterion = self.world(), self.criterion()
        finally:
            torch.set_default_dtype(usual)
        twin, its_criterion = copy.deepcopy((world, criterion))
        if self.exact is not None:
            twin, its_criterion = twin.to(self.exact), its_criterion.to(self.exact)

        def losses(*args: Any, **kwargs: Any) -> Losses:
            return self.per_sample(its_criterion, *args, *kwargs.values())

        def both(criterion: nn.Module, pick: Any, options: dict[str, Any]) -> tuple[Ours, Loop]:
            pick = pick or (lambda net: list(net.parameters()))
            loop = Loop(twin, losses, its_criterion, pick(twin.model), self.lr, **options)
            loop.least = 0.0 if self.exact else loop.least  # small on purpose
            return Ours(world, criterion, pick(world.model), self.lr, **options), loop

        ours, loop = both(criterion, self.owned, self.options)
        if self.second is not None:
            ours.other, loop.other = both(self.criterion(), self.owned_by_second, self.second)
        return ours, loop

    def run(self, side: User, number: int) -> None:
        torch.manual_seed(self.seed + number)
        batch = self.batch(number)
        torch.manual_seed(self.seed + number + 1)  # the same dropout masks
        self.loop(side, batch)


def twin_of(ours: Ours, loop: Loop) -> None:
    """Both sides start a step with the same parameters, and without gradients."""
    loop.world.load_state_dict(ours.world.state_dict())
    for side in (ours, loop, ours.other, loop.other):
        if side is not None:
            for p in side.world.parameters():
                p.grad = None
            side.begin()


# The comparison -----------------------------------------------------------------------------------


def agree(ours: Ours, loop: Loop, tolerance: float, compared: Sequence[str]) -> None:
    """Every gradient of every network, all that the loop noted, buffers, and the record."""
    check_record(ours, loop, tolerance, compared)
    assert [name for name, _ in ours.noted] == [name for name, _ in loop.noted]
    for (name, its), (_, theirs) in zip(ours.noted, loop.noted, strict=True):
        close(
            name,
            its,
            theirs,
            length(theirs) + (name.startswith("d ") and loop.all_length),
            tolerance,
        )
    for (name, its), theirs in zip(ours.world.named_buffers(), loop.world.buffers(), strict=True):
        close(name, its, theirs, length(theirs), tolerance)
    if "gradients" not in compared:
        return
    for (name, p), q in zip(ours.world.named_parameters(), loop.world.parameters(), strict=True):
        truth = torch.zeros_like(q) if q.grad is None else q.grad
        its = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        close(f"{name}.grad", its, truth, length(truth) + loop.all_length, tolerance)


def check_record(ours: Ours, loop: Loop, tolerance: float, compared: Sequence[str]) -> None:
    """The record is of the one batch that a backward pass came to."""
    accumulated = loop.passes > 1
    if (len(loop.decided) != 1) or (loop.arrived != 1 and not accumulated):
        return
    record, (decision, unit, blown_up, _) = ours.optimizer.last_step, loop.decided[0]
    assert record is not None, "no record"
    if bool(decision.fallback) or not len(decision.weights):
        return
    assert len(record.weights) == len(decision.weights), ("samples", len(record.weights))
    theirs = record.worst_off.tolist(), decision.worst_off.tolist()
    assert theirs[0] == theirs[1], ("S", theirs)
    if "scores" in compared:
        close("scores", record.scores, decision.scores, unit, tolerance)
    if "weights" in compared:
        weights = decision.weights
        if loop.given is not None:
            weights = record.scores.clamp(min=0).double()
            weights = weights / weights.sum()
        close("weights", record.weights, weights, 1 + blown_up, tolerance)


def length(tensor: Tensor) -> float:
    return float(tensor.detach().abs().double().nan_to_num(0.0).norm()) if tensor.numel() else 0.0


def close(name: str, ours: Tensor, truth: Tensor, unit: float, tolerance: float) -> None:
    assert ours.shape == truth.shape, (name, ours.shape, truth.shape)
    if not ours.numel():
        return
    wide = torch.complex128 if truth.is_complex() else torch.float64
    difference = (ours.detach().to(wide) - truth.detach().to(wide)).abs()
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    error = float(difference.masked_fill(same, 0).max())
    assert error <= tolerance * unit + 1e-30, (
        f"{name} is off by {error:.2g}, {error / (unit or 1):.2g} of {unit:.2g}"
    )


# Refusals -----------------------------------------------------------------------------------------

LIBRARY = str(Path(irw_optim.__file__).parent)


def is_refusal(error: BaseException) -> bool:
    """Raised by the library itself, in words that tell how to mend it."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    own = raised_in.startswith(LIBRARY)
    kinds = (RuntimeError, ValueError, NotImplementedError)
    text = re.sub(r"\s+", " ", str(error))
    return own and isinstance(error, kinds) and any(re.search(w, text) for w in REFUSALS)
