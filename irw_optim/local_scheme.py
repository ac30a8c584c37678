"""The local scheme: S, g_S and the weights inside each mini-batch (paper, section III)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from irw_optim.backward import weighted_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.outliers import OutlierFilter
from irw_optim.record import StepRecord
from irw_optim.weighting import ScoreRule, uniform, weigh


class Scheme(Protocol):
    """Decides the weights of a batch: this module's `LocalScheme`, or one that holds weights."""

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients) -> StepRecord:
        """The weights of one batch, and all that led to them."""

    def loss(
        self,
        batch: PerSampleLosses,
        engine: Engine,
        scored: Callable[[Tensor], bool],
        note: Callable[[StepRecord], None],
    ) -> Tensor:
        """The criterion's value, carrying the weighted gradient."""


@dataclass(frozen=True)
class LocalScheme:
    """Turns the losses of one batch into a scalar that carries the weighted gradient.

    Attributes:
        alpha: lower bound on the share of the smallest group.
        rule: scores the samples.
        outliers: drops samples first.
        class_balance: whether every class gets the same total weight.
        mix: share of plain averaging in the weights.
    """

    alpha: float
    rule: ScoreRule
    outliers: OutlierFilter | None = None
    class_balance: bool = False
    mix: float = 0.0

    @property
    def needs_gradients(self) -> bool:
        """Whether the weights depend on more than the losses."""
        return self.outliers is not None or getattr(self.rule, "needs_gradients", True)

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients) -> StepRecord:
        """The weights of one batch, and all that led to them."""
        losses = batch.losses.detach()
        labels = batch.labels if self.class_balance else None
        if self.class_balance and labels is None:
            raise ValueError(
                "class_balance=True needs one class label a sample, and the criterion's target "
                "shows none: call optimizer.backward(losses, labels=labels), or set "
                "class_balance=False"
            )
        decided = weigh(
            losses,
            rows,
            self.alpha,
            self.rule,
            outliers=self.outliers,
            labels=labels,
            mix=self.mix,
            present=_present(batch),
        )
        return StepRecord(**vars(decided), losses=losses, labels=batch.labels)

    def loss(
        self,
        batch: PerSampleLosses,
        engine: Engine,
        scored: Callable[[Tensor], bool],
        note: Callable[[StepRecord], None],
    ) -> Tensor:
        """The criterion's value, with ``scale * sum_i w_i grad(loss_i)`` as its gradient.

        Args:
            batch: per-sample losses with their graph.
            engine: gives the per-sample gradients.
            scored: which parameters make the scores.
            note: is told what was decided, when the backward pass runs.
        """
        if not self.needs_gradients:
            return with_known_weights(batch, self.decide(batch, _NoRows(batch)), note)

        def weights(rows: Callable[[], PerSampleGradients]) -> Tensor:
            record = self.decide(batch, rows())
            note(record)
            return record.weights

        captured = engine.capture(batch.losses)
        return weighted_loss(batch.value, captured, batch.scale, scored, weights)


def averaged_loss(batch: PerSampleLosses, note: Callable[[StepRecord], None]) -> Tensor:
    """The criterion's value with its ordinary gradient, noted as a step: the warm-up."""
    return with_known_weights(batch, averaged_record(batch), note)


def averaged_record(batch: PerSampleLosses) -> StepRecord:
    """The record of a step with plain averaging."""
    losses = batch.losses.detach()
    nobody = torch.zeros_like(losses, dtype=torch.bool)
    equal = (
        uniform(losses) if batch.counts is None else batch.counts / batch.counts.sum().clamp(min=1)
    )
    return StepRecord(
        worst_off=nobody,
        outliers=nobody,
        scores=torch.ones_like(losses),
        weights=equal.to(losses.dtype),
        fallback=nobody.any(),
        losses=losses,
        labels=batch.labels,
    )


def with_known_weights(
    batch: PerSampleLosses, record: StepRecord, note: Callable[[StepRecord], None]
) -> Tensor:
    """Where the weights are known before backward, ordinary autograd does the rest."""
    weighted = batch.scale * (record.weights.to(batch.losses.dtype) * batch.losses).sum()
    loss = weighted + (batch.value - weighted).detach()
    loss.register_hook(lambda _: note(record))
    return loss


def _present(batch: PerSampleLosses) -> Tensor | None:
    """The samples that are not ignored altogether; None for all, and where that is nobody."""
    if batch.counts is None:
        return None
    present = batch.counts > 0
    return present if bool(present.any()) else None


class _NoRows:
    """Stands where a rule that looks at losses alone is handed gradients."""

    def __init__(self, batch: PerSampleLosses) -> None:
        self.batch_size = len(batch.losses)

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        raise RuntimeError("a rule with needs_gradients=False asked for gradients")

    def dot(self, direction: object) -> Tensor:
        raise RuntimeError("a rule with needs_gradients=False asked for gradients")

    def gram(self) -> Tensor:
        raise RuntimeError("a rule with needs_gradients=False asked for gradients")
