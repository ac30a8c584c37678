"""What is kept of one step, and given to loggers: a row of numbers, and on whom they fell.

``docs/diagnostics.md`` says what the columns mean. O(B) work.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from irw_optim.metrics._groups import intersect
from irw_optim.weighting import worst_off_count
from irw_optim.weighting.record import StepRecord

Array: TypeAlias = npt.NDArray[Any]

OF_A_PART = ("samples", "worst_off", "weight", "removed", "loss")
"""Columns of a `Breakdown`: shares of the batch, of S, of the weight; its own share that was
removed; its mean loss."""


class Batch(NamedTuple):
    """A step's record as numpy arrays of shape (B,) on the CPU."""

    losses: Array
    worst_off: Array
    outliers: Array
    weights: Array
    fallback: float
    gradient_norm: float
    labels: Array | None

    def part(self, chosen: Array) -> Batch:
        """The chosen samples, (B,) bool."""
        fields: dict[str, Any] = self._asdict()
        arrays = {n: v[chosen] for n, v in fields.items() if isinstance(v, np.ndarray)}
        return Batch(**{**fields, **arrays})


class Breakdown(NamedTuple):
    """The classes or groups of a batch, sorted, and of each the numbers `OF_A_PART`, (parts, 5)."""

    parts: tuple[Hashable, ...]
    numbers: Array

    def column(self, name: str) -> dict[Hashable, float]:
        """One of `OF_A_PART`, by part."""
        values = self.numbers[:, OF_A_PART.index(name)].tolist()
        return dict(zip(self.parts, values, strict=True))


@dataclass(frozen=True, eq=False)
class Row:
    """One recorded step: what holds for the batch as a whole, by column, and for its parts.

    The parts are those by ``"class"`` and by ``"group"``, where these are known.
    """

    step: int
    numbers: dict[str, float]
    breakdowns: dict[str, Breakdown]

    def flat(self, most_parts: float = math.inf) -> dict[str, float]:
        """One number a column, as in ``weight/class_1``, without partitions of too many parts."""
        row = {"step": self.step, **self.numbers}
        for kind, breakdown in self.breakdowns.items():
            if len(breakdown.parts) > most_parts:
                continue
            names = [f"{kind}_{_text(part)}" for part in breakdown.parts]
            for column, values in zip(OF_A_PART, breakdown.numbers.T.tolist(), strict=True):
                row |= {f"{column}/{name}": v for name, v in zip(names, values, strict=True)}
        return row

    def state(self) -> dict[str, Any]:
        """The row as plain data, for a checkpoint."""
        tables = {k: (list(b.parts), b.numbers.tolist()) for k, b in self.breakdowns.items()}
        return {"step": self.step, "numbers": self.numbers, "breakdowns": tables}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Row:
        """The row that gave this `state`."""
        tables = state["breakdowns"].items()
        by_kind = {k: Breakdown(tuple(parts), np.array(numbers)) for k, (parts, numbers) in tables}
        return cls(state["step"], dict(state["numbers"]), by_kind)


def read(record: StepRecord, gradient_norm: Tensor) -> Batch:
    """Bring a record to the CPU, float32, waiting for the device once (twice with labels)."""
    like = record.losses
    vectors = [record.losses, record.worst_off, record.outliers, record.weights]
    vectors += [v.to(like.device).expand_as(like) for v in (record.fallback, gradient_norm)]
    losses, worst_off, outliers, weights, fallback, norm = (
        torch.stack([v.float() for v in vectors]).cpu().numpy()
    )
    labels = None if record.labels is None else record.labels.cpu().numpy()
    return Batch(losses, worst_off, outliers, weights, float(fallback[0]), float(norm[0]), labels)


def summarise(batch: Batch, alpha: float) -> dict[str, float]:
    """The columns that hold for a batch as a whole; B >= 1."""
    losses, weights = batch.losses.astype(np.float64), batch.weights.astype(np.float64)
    size, squares = len(losses), float(weights @ weights)
    effective = float(weights.sum()) ** 2 / squares if squares else 0.0
    ascending = np.sort(losses)
    median, q90, q99 = ascending[np.ceil(np.array([0.5, 0.9, 0.99]) * size).astype(int) - 1]
    return {
        "samples": float(size),
        "worst_off_samples": float(batch.worst_off.sum()),
        "effective_samples": effective,
        "effective_share": effective / size,
        "weight_spread": float((size * weights).std()),
        "zero_share": float((weights == 0).mean()),
        "largest_weight": float(weights.max()),
        "worst_off_weight": float(weights @ batch.worst_off),
        "removed_share": float(batch.outliers.mean()),
        "mean_loss": float(losses.mean()),
        "worst_alpha_loss": float(ascending[-worst_off_count(size, alpha) :].mean()),
        "loss_median": float(median),
        "loss_q90": float(q90),
        "loss_q99": float(q99),
        "largest_loss": float(ascending[-1]),
        "gradient_norm": batch.gradient_norm,
        "fallback": batch.fallback,
    }


def by_class(batch: Batch) -> Breakdown | None:
    """The batch by class; None where the criterion's target shows no classes."""
    return None if batch.labels is None else by_group(batch, {"class": batch.labels})


def by_group(batch: Batch, groups: Mapping[str, Array]) -> Breakdown:
    """The batch by group; of several columns, by each combination that occurs."""
    parts, member = intersect(groups)
    size = np.bincount(member)

    def in_each(values: Array) -> Array:
        return np.bincount(member, weights=values)

    columns = [
        size / size.sum(),
        in_each(batch.worst_off) / max(batch.worst_off.sum(), 1.0),
        in_each(batch.weights) / (batch.weights.sum() or 1.0),
        in_each(batch.outliers) / size,
        in_each(batch.losses) / size,
    ]
    return Breakdown(tuple(parts), np.stack(columns, axis=1))


def _text(part: Hashable) -> str:
    return ",".join(map(str, part)) if isinstance(part, tuple) else str(part)


MOST_PARTS = 20
"""A logger is spared partitions with more parts: a thousand charts help nobody."""

PREFIX = "irw/"
"""Of the names in a logger, which shows what shares one together."""


class ScalarWriter(Protocol):
    """``torch.utils.tensorboard.SummaryWriter``, and whatever else takes one number."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take one number."""


class MetricsLogger(Protocol):
    """Any logger of Lightning's, and whatever else takes numbers by name."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> Any:
        """Take the numbers of one step."""


Logger: TypeAlias = ScalarWriter | MetricsLogger


def check_logger(logger: Any) -> None:
    """Raise a TypeError that says what can take rows, if this cannot."""
    if isinstance(logger, type) or not (
        hasattr(logger, "add_scalar") or hasattr(logger, "log_metrics")
    ):
        raise TypeError(
            f"logger={logger!r}: expected a torch.utils.tensorboard.SummaryWriter, a Lightning "
            "logger such as CSVLogger(path), or an object with add_scalar(tag, value, step) or "
            "log_metrics(metrics, step)"
        )


def send(row: Row, logger: Logger) -> None:
    """Give a row to a logger; what is not known in it (NaN) is left out."""
    numbers = row.flat(MOST_PARTS)
    del numbers["step"]
    known = {PREFIX + name: value for name, value in numbers.items() if not math.isnan(value)}
    if hasattr(logger, "log_metrics"):
        logger.log_metrics(known, step=row.step)
    else:
        for name, value in known.items():
            logger.add_scalar(name, value, row.step)
