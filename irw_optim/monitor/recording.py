"""One step of an optimizer as a row: O(B) work, on recorded steps alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from irw_optim.metrics._groups import intersect
from irw_optim.optimizer import IRWOptimizer
from irw_optim.optimizer.at_hand import stored_in
from irw_optim.schemes.weighing import HeldWeights
from irw_optim.weighting import StepRecord, worst_off_count

from .rows import Array, Breakdown, Row


class Batch(NamedTuple):
    """A step's record as numpy arrays of shape (B,) on the CPU."""

    losses: Array
    worst_off: Array
    outliers: Array
    weights: Array
    counts: Array
    fallback: float
    gradient_norm: float
    labels: Array | None

    def part(self, chosen: Array) -> "Batch":
        """The chosen samples, (B,) bool."""
        fields: Any = [v[chosen] if isinstance(v, np.ndarray) else v for v in self]
        return Batch(*fields)


def row_of(
    optimizer: IRWOptimizer,
    record: StepRecord,
    held_for: int | None,
    passes: Sequence[Mapping[str, Array]],
) -> Row | None:
    """The row of the step just taken, with `groups_of` passes; None where nobody has a target."""
    batch, scheme = read(record, gradient_norm(optimizer)), optimizer.scheme
    counted = batch.counts > 0
    own = np.ones_like(counted) if record.own is None else record.own.cpu().numpy()
    groups = groups_of(passes, record) if passes else None
    batch, mine, mine_counted = batch.part(counted), batch.part(own & counted), counted[own]
    if not len(batch.losses):
        return None
    held_agreement = np.nan
    if isinstance(scheme, HeldWeights) and scheme.record is not None and scheme.indices is not None:
        worst_off = scheme.record.worst_off  # when the weights were made
        in_s = worst_off[scheme.indices.to(worst_off.device)].cpu().numpy()
        held_agreement = agreement(mine.losses, in_s[mine_counted])
    numbers = {
        "weighted": float(optimizer.steps > optimizer.warmup_steps),
        **summarise(batch, float(optimizer.own_state()["alpha"])),
        "held_for": np.nan if held_for is None else float(held_for),
        "resampled": float(getattr(scheme, "resampled", False)),
        "held_agreement": held_agreement,
    }
    breakdowns = {}
    if batch.labels is not None:
        breakdowns["class"] = by_group(batch, {"class": batch.labels})
    if groups is not None and len(mine.losses):
        of_mine = {name: column[mine_counted] for name, column in groups.items()}
        breakdowns["group"] = by_group(mine, of_mine)
    return Row(optimizer.steps, numbers, breakdowns)


def read(record: StepRecord, gradient_norm: Tensor) -> Batch:
    """A record on the CPU, float32, waiting for the device once (twice with labels)."""
    like = record.losses
    counts = torch.ones_like(like) if record.counts is None else record.counts
    vectors = [like, record.worst_off, record.outliers, record.weights]
    vectors += [v.to(like.device).expand_as(like) for v in (counts, record.fallback, gradient_norm)]
    *each, fallback, norm = torch.stack([v.float() for v in vectors]).cpu().numpy()
    labels = None if record.labels is None else record.labels.cpu().numpy()
    fields: Any = [*each, float(fallback[0]), float(norm[0]), labels]
    return Batch(*fields)


def summarise(batch: Batch, alpha: float) -> dict[str, float]:
    """The columns that hold for a batch as a whole; B >= 1."""
    losses, weights = batch.losses.astype(np.float64), batch.weights.astype(np.float64)
    size, squares = len(losses), float(weights @ weights)
    effective = float(weights.sum()) ** 2 / squares if squares else 0.0
    ascending = np.sort(losses)
    median, q90, q99 = ascending[np.ceil(np.array([0.5, 0.9, 0.99]) * size).astype(int) - 1]
    numbers = {
        "samples": size,
        "worst_off_samples": batch.worst_off.sum(),
        "effective_samples": effective,
        "effective_share": effective / size,
        "weight_spread": (size * weights).std(),
        "zero_share": (weights == 0).mean(),
        "largest_weight": weights.max(),
        "worst_off_weight": weights @ batch.worst_off,
        "removed_share": batch.outliers.mean(),
        "mean_loss": losses.mean(),
        "worst_alpha_loss": ascending[-worst_off_count(size, alpha) :].mean(),
        "loss_median": median,
        "loss_q90": q90,
        "loss_q99": q99,
        "largest_loss": ascending[-1],
        "gradient_norm": batch.gradient_norm,
        "fallback": batch.fallback,
    }
    return {name: float(number) for name, number in numbers.items()}


def by_group(batch: Batch, groups: Mapping[str, Array]) -> Breakdown:
    """The batch by group; of several columns, by each combination that occurs."""
    parts, member = intersect(groups)
    size = np.bincount(member)

    values = (batch.worst_off, batch.weights, batch.outliers, batch.losses)
    worst_off, weights, outliers, losses = (np.bincount(member, weights=v) for v in values)
    columns = [
        size / size.sum(),
        worst_off / max(worst_off.sum(), 1.0),
        weights / (batch.weights.sum() or 1.0),
        outliers / size,
        losses / size,
    ]
    return Breakdown(tuple(parts), np.stack(columns, axis=1))


def groups_of(given: Sequence[Mapping[str, Array]], record: StepRecord) -> dict[str, Array]:
    """The groups of the newest passes that have this process's samples together, by column."""
    size = len(record.losses) if record.own is None else int(record.own.sum())
    lengths = [len(next(iter(columns.values()))) for columns in given]
    first = len(given)
    while first and sum(lengths[first:]) < size:
        first -= 1
    if sum(lengths[first:]) != size:
        raise ValueError(
            f"the step was on a batch of {size} samples, but monitor.groups() was given "
            f"{' + '.join(map(str, lengths))}: expected one label for each sample, in one call for "
            "each backward pass"
        )
    return {name: np.concatenate([columns[name] for columns in given[first:]]) for name in given[0]}


def gradient_norm(optimizer: IRWOptimizer) -> Tensor:
    """The norm of ``p.grad`` as the step left it, 0-dim."""
    gradients = [
        stored_in(p.grad)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    norm: Any = get_total_norm(gradients) if gradients else torch.zeros(())
    if hasattr(norm, "full_tensor"):  # of shards, on several processes
        norm = norm.full_tensor()
    return norm  # type: ignore[no-any-return]


class WeightAge:
    """How long an optimizer's scheme holds its weights, by identity: it waits for nothing."""

    def __init__(self) -> None:
        self.load({"step": 0, "weights": None})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there, if the same weights come back."""
        self.step: int = state["step"]
        self._resumed: float | None = state["weights"]
        self._known: Callable[[], StepRecord | None] = lambda: None

    def age(self, scheme: object, step: int) -> int | None:
        """Steps since the first with the weights held now; None for a local scheme."""
        record = scheme.record if isinstance(scheme, HeldWeights) else None
        if record is None:
            return None
        if self._known() is not record:
            if self._resumed is None or self._resumed != _fingerprint(record):
                self.step = step
            self._known, self._resumed = ref(record), None
        return step - self.step

    def state(self) -> dict[str, Any]:
        """Since when they are held, and what is in them."""
        record = self._known()
        return {"step": self.step, "weights": None if record is None else _fingerprint(record)}

    __getstate__, __setstate__ = state, load


def _fingerprint(record: StepRecord) -> float:
    return float(record.losses.double().sum())


def agreement(losses: Array, worst_off: Array) -> float:
    """The area under the ROC curve of S by the losses, NaN where everybody is in S, or nobody.

    P(a member of S has a larger loss than somebody else): 1/2 where S says nothing more.
    """
    from sklearn.metrics import roc_auc_score  # takes longer to import than this package

    inside = worst_off.astype(bool)
    if inside.all() or not inside.any():
        return np.nan
    values = losses.astype(np.float64)
    values[~np.isfinite(values)] = np.finfo(np.float64).max  # the largest of all
    return float(roc_auc_score(inside, values))
