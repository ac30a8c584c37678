"""How old the weights of a global scheme are, and how much they still say."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np

from irw_optim.monitor.rows import Array
from irw_optim.schemes.held_weights import HeldWeights
from irw_optim.weighting.record import StepRecord


class WeightAge:
    """Watches the weights that an optimizer's scheme holds, by identity: it waits for nothing."""

    def __init__(self) -> None:
        self.step = 0
        self._known: ref[StepRecord] | None = None
        self._resumed: float | None = None

    def age(self, scheme: object, step: int) -> int | None:
        """Steps since the first with the weights held now; None for a local scheme."""
        record = scheme.record if isinstance(scheme, HeldWeights) else None
        if record is None:
            return None
        if self._known is None or self._known() is not record:
            self._known = ref(record)
            if self._resumed is None or self._resumed != _fingerprint(record):
                self.step = step
            self._resumed = None
        return step - self.step

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows the weights of its own scheme as a checkpoint does, by what is in them."""
        return self.state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.load(state)

    def state(self) -> dict[str, Any]:
        """The step since which the weights are held, and which weights."""
        record = None if self._known is None else self._known()
        return {"step": self.step, "weights": None if record is None else _fingerprint(record)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there, if the scheme comes back with the same weights."""
        self.step, self._known, self._resumed = state["step"], None, state["weights"]


def worst_off_when_made(scheme: object) -> Array | None:
    """Who of the newest batch was among the worst off when the weights were made, (B,)."""
    if not isinstance(scheme, HeldWeights) or scheme.record is None or scheme.indices is None:
        return None
    worst_off = scheme.record.worst_off
    return worst_off[scheme.indices.to(worst_off.device)].cpu().numpy()


def _fingerprint(record: StepRecord) -> float:
    return float(record.losses.double().sum())


def agreement(losses: Array, worst_off: Array) -> float:
    """P(a member of S has a larger loss than somebody else), ties counting half; S, losses (B,).

    1 where the worst off are still those, 1/2 where S says nothing any more; NaN where everybody
    or nobody is a member. (The area under the ROC curve of the losses.)

    >>> agreement(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False]))
    0.75
    """
    from sklearn.metrics import roc_auc_score  # takes longer to import than this package

    inside = worst_off.astype(bool)
    if inside.all() or not inside.any():
        return float("nan")
    values = losses.astype(np.float64)
    values[~np.isfinite(values)] = np.finfo(np.float64).max  # the largest of all
    return float(roc_auc_score(inside, values))
