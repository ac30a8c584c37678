"""How weights are chosen; the local scheme, inside a mini-batch (paper, section III)."""

from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.notebook import html_table

from .outliers import OutlierFilter
from .weights import (
    Alignment,
    ScoreRule,
    Weights,
    irw_weights,
    normalise,
    present_of,
    uniform,
    weigh,
    worst_off,
    worst_off_count,
)

__all__ = [
    "Alignment",
    "Equality",
    "Membership",
    "ScoreRule",
    "Weights",
    "irw_weights",
    "normalise",
    "present_of",
    "uniform",
    "weigh",
    "worst_off",
    "worst_off_count",
]


@dataclass(frozen=True)
class StepRecord(Weights):
    """What one backward pass decided (`IRWOptimizer.last_step`): tensors of shape (B,), detached.

    Attributes:
        losses: per-sample losses.
        labels: classes, where the target shows them.
        worst_off: bool, the members of S.
        outliers: bool, whom a filter removed; their weight is 0.
        scores: s_i = <g_i, g_S>, or another rule's; float64 where the losses' is too narrow.
        weights: w_i, sums to 1.
        fallback: 0-dim bool: no score was positive, the weights are uniform.
        finite: whether losses and scores are; None where nobody has looked.
        own: bool, this process's samples where B counts those of all ranks.
        counts: targets of each that the criterion does not ignore; None for equally many.
    """

    losses: Tensor = field(kw_only=True)
    labels: Tensor | None = None
    own: Tensor | None = None
    counts: Tensor | None = None

    @property
    def effective_sample_size(self) -> float:
        """1 / sum(w^2): B for uniform weights, 1 where one sample has all."""
        total = float(self.weights.square().sum())
        return 1 / total if total else 0.0

    @property
    def broken_samples(self) -> list[int]:
        """Samples whose loss is not finite, or else their score."""
        if self.finite:
            return []
        # What is not finite gives no finite product or sum. One look, as it waits.
        if isfinite(float(self.losses.to(self.scores.dtype).dot(self.scores))):
            return []
        of_losses, of_scores = (
            (~values.isfinite()).nonzero().flatten().tolist()
            for values in (self.losses, self.scores)
        )
        return of_losses or of_scores

    def check_finite(self) -> None:
        """A FloatingPointError that names `broken_samples`, if there are any."""
        refuse_broken(
            *("losses or gradients", "batch", self.broken_samples),
            "nothing was updated; look at optimizer.last_step.losses",
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._summary())

    def _repr_html_(self) -> str:
        most = self.weights.argsort(descending=True)[:5].tolist()
        rows = [
            (i, *(f"{float(t[i]):.4g}" for t in (self.losses, self.scores, self.weights)))
            for i in most
        ]
        header = ("heaviest samples", "loss", "score", "weight")
        return html_table(("the step", ""), self._summary()) + html_table(header, rows)

    def _summary(self) -> list[tuple[str, object]]:
        return [
            ("samples", len(self.losses)),
            ("worst off", int(self.worst_off.sum())),
            ("outliers", int(self.outliers.sum())),
            ("with a weight", int((self.weights > 0).sum())),
            ("effective sample size", f"{self.effective_sample_size:.1f}"),
            ("uniform for want of a score", "yes" if bool(self.fallback) else "no"),
        ]


def refuse_broken(what: str, of: str, broken: list[int], then: str) -> None:
    """A FloatingPointError that names the broken samples, if there are any."""
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        raise FloatingPointError(
            f"the {what} of {len(broken)} samples are not finite ({of} indices {shown}): {then}"
        )


class Scheme(Protocol):
    """Decides the weights of a batch."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the weights depend on more than the losses."""

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients) -> StepRecord:
        """The weights, and all that led to them."""


@dataclass(frozen=True)
class Membership:
    """CVaR: the worst-off share, equally weighted."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        """Scores of a batch, (B,)."""
        return worst_off.to(losses.dtype)


@dataclass(frozen=True)
class Equality:
    """Plain training: everybody alike."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        """Scores of a batch, (B,)."""
        return torch.ones_like(losses)


NAMED: dict[str, type[Alignment | Membership | Equality]] = {
    "irw": Alignment,
    "cvar": Membership,
    "uniform": Equality,
}
"""What the optimizer's argument ``weighting`` may be."""


def rule_named(weighting: str | ScoreRule, center: float) -> ScoreRule:
    """The rule that it means."""
    if not isinstance(weighting, str):
        return weighting
    return Alignment(center) if weighting == "irw" else NAMED[weighting]()


@dataclass(frozen=True)
class LocalScheme:
    """Weighs the samples of a batch against each other, as `IRWOptimizer` says."""

    alpha: float
    rule: ScoreRule
    outliers: OutlierFilter | None = None
    class_balance: bool = False
    mix: float = 0.0
    known: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def needs_gradients(self) -> bool:
        """As of `Scheme`."""
        return self.outliers is not None or getattr(self.rule, "needs_gradients", True)

    @cached_property
    def needs_one_product(self) -> bool:
        """Whether they need but G (G^T c), for one c."""
        return self.outliers is None and isinstance(self.rule, Alignment)

    def decide(
        self, batch: PerSampleLosses, rows: PerSampleGradients, removed: Tensor | None = None
    ) -> StepRecord:
        """As of `Scheme`; ``removed`` (B,) bool are outliers that are known."""
        losses = batch.losses.detach() if batch.losses.requires_grad else batch.losses
        labels = batch.labels if self.class_balance else None
        if self.class_balance and labels is None:
            raise ValueError(
                "class_balance=True needs one class label a sample, and the criterion's target "
                "shows none: call optimizer.backward(losses, labels=labels), use a criterion whose "
                "target is a class, or set class_balance=False"
            )
        # The products of a data set take too long to be made again.
        alone = self.needs_one_product and removed is None
        decided = weigh(
            losses,
            rows,
            self.alpha,
            self.rule,
            outliers=self.outliers,
            labels=labels,
            mix=self.mix,
            counts=batch.counts,
            elements=batch.elements,
            removed=removed,
            known=self.known if alone and hasattr(rows, "align") else None,
        )
        told = vars(decided)
        return StepRecord(**told, losses=losses, labels=batch.labels, counts=batch.counts)


class Averaging:
    """Plain training: equal weights, for equally many elements."""

    needs_gradients = False
    needs_one_product = True  # none at all, but the gradient

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients | None) -> StepRecord:
        """As of `Scheme`."""
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
            counts=batch.counts,
        )


class NoRows:
    """For a rule of losses alone."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def combine(self, _: object = None) -> NoReturn:
        """Not on offer."""
        raise RuntimeError("a rule with needs_gradients=False asked for gradients")

    dot = gram = combine
