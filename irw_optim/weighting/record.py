"""What one step did, for whoever wants to look: `IRWOptimizer.last_step`."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from torch import Tensor

from irw_optim.notebook import html_table
from irw_optim.weighting.weights import Weights


@dataclass(frozen=True)
class StepRecord(Weights):
    """The decisions of one backward pass; all tensors but one of shape (B,), detached.

    Attributes:
        losses: per-sample losses.
        labels: class labels of the samples where the criterion's target shows them, else None.
        worst_off: bool, the members of S.
        outliers: bool, the samples that a filter removed; their weight is 0.
        scores: s_i = <g_i, g_S> (or the score of another rule); 0 for removed samples, and float64
            where the losses' dtype is too narrow for them.
        weights: w_i, sums to 1.
        fallback: 0-dim bool, True where no score was positive and the weights are uniform.
        finite: whether all losses and scores are finite; None where nobody has looked yet.
        own: bool, the samples of this process where B counts those of all processes, in the order
            of their ranks; None where all are.
    """

    losses: Tensor = field(kw_only=True)
    labels: Tensor | None = None
    own: Tensor | None = None

    @property
    def effective_sample_size(self) -> float:
        """1 / sum(w^2): B for uniform weights, 1 where one sample has all the weight."""
        total = float(self.weights.square().sum())
        return 1 / total if total else 0.0

    @property
    def broken_samples(self) -> list[int]:
        """Samples whose loss is not finite, or failing that, whose score is not."""
        if self.finite:
            return []
        # No number that is not finite gives a finite product or sum. One look, as it waits.
        if isfinite(float(self.losses.to(self.scores.dtype).dot(self.scores))):
            return []
        for values in (self.losses, self.scores):
            if not bool(values.isfinite().all()):
                return [int(i) for i in (~values.isfinite()).nonzero().flatten()]
        return []

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
