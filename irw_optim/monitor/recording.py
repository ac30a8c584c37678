"""One step of an optimizer as a row: everything here runs on recorded steps alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from irw_optim.metrics._inputs import GroupsLike, as_columns
from irw_optim.monitor.rows import Array, Batch, Row, by_class, by_group, read, summarise
from irw_optim.optimizer import IRWOptimizer
from irw_optim.schemes.held_weights import HeldWeights
from irw_optim.weighting.record import StepRecord


def row_of(
    optimizer: IRWOptimizer,
    record: StepRecord,
    held_for: int | None,
    passes: Sequence[GroupsLike],
) -> Row | None:
    """The row of the step that the optimizer just took; None where nobody has a target.

    The weights were made ``held_for`` steps ago, None for a local scheme; ``passes`` has the groups
    of each backward pass, oldest first. A ValueError where these do not fit.
    """
    batch = read(record, gradient_norm(optimizer))
    own = record.own  # of several processes, whose samples the record holds
    mine = batch if own is None else batch.part(own.cpu().numpy())
    groups = groups_of(passes, len(mine.losses)) if passes else None
    held = worst_off_when_made(optimizer.scheme)
    ignored = getattr(optimizer.criterion, "ignore_index", None)
    batch = batch.part(with_a_target(batch, ignored))
    counted = with_a_target(mine, ignored)
    mine = mine.part(counted)
    if not len(batch.losses):
        return None
    unknown = float("nan")
    numbers = {
        "weighted": float(optimizer.steps > optimizer.warmup_steps),
        **summarise(batch, float(optimizer.own_state()["alpha"])),
        "held_for": unknown if held_for is None else float(held_for),
        "resampled": float(getattr(optimizer.scheme, "resampled", False)),
        "held_agreement": unknown if held is None else agreement(mine.losses, held[counted]),
    }
    classes = by_class(batch)
    breakdowns = {} if classes is None else {"class": classes}
    if groups is not None and len(mine.losses):
        of_mine = {name: column[counted] for name, column in groups.items()}
        breakdowns["group"] = by_group(mine, of_mine)
    return Row(optimizer.steps, numbers, breakdowns)


def groups_of(passes: Sequence[GroupsLike], size: int) -> dict[str, Array]:
    """The groups of the newest backward passes that have ``size`` samples together, by column.

    >>> groups_of([["old"], ["a"], ["b", "b"]], size=3)["group"].tolist()
    ['a', 'b', 'b']
    """
    given = [as_columns(groups) for groups in passes]
    lengths = [len(next(iter(columns.values()))) for columns in given]
    first = len(given)
    while first and sum(lengths[first:]) < size:
        first -= 1
    if sum(lengths[first:]) != size:
        raise ValueError(
            f"the step was on a batch of {size} samples, but monitor.groups() was given "
            f"{' + '.join(map(str, lengths))}: expected one label for each sample of the batch, in "
            "one call for each backward pass"
        )
    return {name: np.concatenate([columns[name] for columns in given[first:]]) for name in given[0]}


def with_a_target(batch: Batch, ignored: int | None) -> Array:
    """(B,) bool, False for targets that the criterion ignores, which are nobody's."""
    if batch.labels is None or ignored is None:
        return np.ones(len(batch.losses), dtype=bool)
    return np.asarray(batch.labels != ignored)


def gradient_norm(optimizer: IRWOptimizer) -> Tensor:
    """The norm of ``p.grad`` as the step left it, 0-dim."""
    gradients = [
        p.grad.coalesce().values() if p.grad.is_sparse else p.grad
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    norm: Any = get_total_norm(gradients) if gradients else torch.zeros(())
    if hasattr(norm, "full_tensor"):  # of shards, on several processes
        norm = norm.full_tensor()
    return norm  # type: ignore[no-any-return]


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

    def state(self) -> dict[str, Any]:
        """The step since which the weights are held, and which weights, by what is in them."""
        record = None if self._known is None else self._known()
        return {"step": self.step, "weights": None if record is None else _fingerprint(record)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there, if the scheme comes back with the same weights."""
        self.step, self._known, self._resumed = state["step"], None, state["weights"]

    __getstate__, __setstate__ = state, load


def _fingerprint(record: StepRecord) -> float:
    return float(record.losses.double().sum())


def worst_off_when_made(scheme: object) -> Array | None:
    """Who of the newest batch was among the worst off when the weights were made, (B,)."""
    if not isinstance(scheme, HeldWeights) or scheme.record is None or scheme.indices is None:
        return None
    worst_off = scheme.record.worst_off
    return worst_off[scheme.indices.to(worst_off.device)].cpu().numpy()


def agreement(losses: Array, worst_off: Array) -> float:
    """The area under the ROC curve of S by the losses (B,), NaN where everybody is in S, or nobody.

    It is P(a member of S has a larger loss than somebody else), ties counting half: 1 where the
    worst off are still those, 1/2 where S says nothing any more.

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
