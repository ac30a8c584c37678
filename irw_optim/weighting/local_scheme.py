"""The local scheme: S, g_S and the weights inside each mini-batch (paper, section III)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.record import StepRecord
from irw_optim.weighting.weights import Alignment, Equality, Membership, ScoreRule, uniform, weigh


class Scheme(Protocol):
    """Decides the weights of a batch: this module's `LocalScheme`, or one that holds weights."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the weights depend on more than the losses."""

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients) -> StepRecord:
        """The weights of one batch, and all that led to them."""


NAMED: dict[str, type[Alignment | Membership | Equality]] = {
    "irw": Alignment,
    "cvar": Membership,
    "uniform": Equality,
}
"""The rules that the optimizer's argument ``weighting`` knows by name: all of a rule's places."""


def rule_named(weighting: str | ScoreRule, center: float) -> ScoreRule:
    """The rule that the optimizer's argument ``weighting`` means."""
    if not isinstance(weighting, str):
        return weighting
    return Alignment(center) if weighting == "irw" else NAMED[weighting]()


@dataclass(frozen=True)
class LocalScheme:
    """Weighs the samples of one batch against each other; `IRWOptimizer` says more."""

    alpha: float
    rule: ScoreRule
    outliers: OutlierFilter | None = None
    class_balance: bool = False
    mix: float = 0.0

    @cached_property
    def needs_gradients(self) -> bool:
        """Whether the weights depend on more than the losses."""
        return self.outliers is not None or getattr(self.rule, "needs_gradients", True)

    @cached_property
    def needs_one_product(self) -> bool:
        """Whether all that they need of G is G (G^T c), for one c."""
        return self.outliers is None and isinstance(self.rule, Alignment)

    def decide(
        self, batch: PerSampleLosses, rows: PerSampleGradients, removed: Tensor | None = None
    ) -> StepRecord:
        """The weights of one batch; ``removed`` (B,) bool are its outliers, if known already."""
        losses = batch.losses.detach() if batch.losses.requires_grad else batch.losses
        labels = batch.labels if self.class_balance else None
        if self.class_balance and labels is None:
            raise ValueError(
                "class_balance=True needs one class label a sample, and the criterion's target "
                "shows none: call optimizer.backward(losses, labels=labels), use a criterion whose "
                "target is a class, or set class_balance=False"
            )
        decided = weigh(
            losses,
            rows,
            self.alpha,
            self.rule,
            outliers=self.outliers,
            labels=labels,
            mix=self.mix,
            present=None if batch.counts is None else present_in(batch),
            removed=removed,
        )
        return StepRecord(**vars(decided), losses=losses, labels=batch.labels)


class Averaging:
    """Plain training, as a scheme: the warm-up."""

    needs_gradients = False
    needs_one_product = True  # none at all, but the gradient

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients | None) -> StepRecord:
        """Equal weights, for equally many elements."""
        losses = batch.losses.detach()
        nobody = torch.zeros_like(losses, dtype=torch.bool)
        if batch.counts is None:
            equal = uniform(losses)
        else:  # a quotient of integers would be one in float32
            counts = batch.counts.to(torch.promote_types(losses.dtype, torch.float32))
            equal = counts / counts.sum().clamp(min=1)
        return StepRecord(
            worst_off=nobody,
            outliers=nobody,
            scores=torch.ones_like(losses),
            weights=equal.to(losses.dtype),
            fallback=nobody.any(),
            losses=losses,
            labels=batch.labels,
        )


def present_in(batch: PerSampleLosses) -> Tensor | None:
    """The samples that are not ignored altogether; all, where that is nobody, and None for all."""
    if batch.counts is None:
        return None
    present = batch.counts > 0
    return present | ~present.any()


class NoRows:
    """Stands where a rule that looks at losses alone is handed gradients."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def combine(self, _: object = None) -> NoReturn:
        """Not on offer, and neither are the other products."""
        raise RuntimeError("a rule with needs_gradients=False asked for gradients")

    dot = gram = combine
