"""The rows of a training, and the course of them all; ``docs/diagnostics.md`` has the columns."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

OF_A_PART = ("samples", "worst_off", "weight", "removed", "loss")
"""Shares of the batch, of S, of the weight; of the part what is removed; mean loss."""


class Breakdown(NamedTuple):
    """The classes or groups of a batch, and the numbers `OF_A_PART` of each, (parts, 5)."""

    parts: tuple[Hashable, ...]
    numbers: Array

    def column(self, name: str) -> dict[Hashable, float]:
        values = self.numbers[:, OF_A_PART.index(name)].tolist()
        return dict(zip(self.parts, values, strict=True))


@dataclass(frozen=True, eq=False)
class Row:
    """One recorded step: numbers of the batch, and by ``"class"`` and ``"group"`` if known."""

    step: int
    numbers: dict[str, float]
    breakdowns: dict[str, Breakdown]

    def flat(self, most_parts: float = math.inf) -> dict[str, float]:
        row = {"step": self.step, **self.numbers}
        for kind, breakdown in self.breakdowns.items():
            if len(breakdown.parts) > most_parts:
                continue
            names = [f"{kind}_{_text(part)}" for part in breakdown.parts]
            for column, values in zip(OF_A_PART, breakdown.numbers.T.tolist(), strict=True):
                row |= {f"{column}/{name}": v for name, v in zip(names, values, strict=True)}
        return row

    def state(self) -> dict[str, Any]:
        tables = {k: (list(b.parts), b.numbers.tolist()) for k, b in self.breakdowns.items()}
        return {"step": self.step, "numbers": self.numbers, "breakdowns": tables}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Row":
        tables = state["breakdowns"].items()
        by_kind = {k: Breakdown(tuple(parts), np.array(numbers)) for k, (parts, numbers) in tables}
        return cls(state["step"], dict(state["numbers"]), by_kind)


def _text(part: Hashable) -> str:
    values = [str(v).replace(",", "\\,") for v in part] if isinstance(part, tuple) else [str(part)]
    return ",".join(values)


class ScalarWriter(Protocol):
    """``torch.utils.tensorboard.SummaryWriter``, and its like."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class MetricsLogger(Protocol):
    """Any logger of Lightning's, and its like."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> Any: ...


Logger: TypeAlias = ScalarWriter | MetricsLogger


def send(row: Row, logger: Logger) -> None:
    numbers = row.flat(most_parts=20)  # a thousand charts help nobody
    del numbers["step"]
    known = {f"irw/{name}": value for name, value in numbers.items() if not math.isnan(value)}
    if hasattr(logger, "log_metrics"):
        logger.log_metrics(known, step=row.step)
    else:
        for name, value in known.items():
            logger.add_scalar(name, value, row.step)


@dataclass(eq=False)
class Course:
    """The first row, which the present is compared with, and the newest at every interval."""

    interval: int
    capacity: int
    rows: list[Row] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Whether a row of this step is wanted."""
        return not self.rows or step % self.interval == 0

    def add(self, row: Row) -> None:
        """Take a row; one that goes back to a checkpoint takes what came after with it."""
        while self.rows and self.rows[-1].step >= row.step:
            self.rows.pop()
        self.rows.append(row)
        while len(self.rows) > self.capacity:
            self.interval *= 2
            first, *others = self.rows
            self.rows = [first, *(r for r in others if r.step % self.interval == 0)]

    @property
    def weighted(self) -> list[Row]:
        return [row for row in self.rows if row.numbers["weighted"]]

    @property
    def recent(self) -> list[Row]:
        return self.weighted[len(self.weighted) // 2 :]

    def recent_with(self, *, held: bool) -> list[Row]:
        """Rows with weights held, or made in the step."""
        return [row for row in self.recent if np.isnan(row.numbers["held_for"]) != held]


def column(rows: Sequence[Row], name: str) -> Array:
    return np.array([row.numbers[name] for row in rows], dtype=np.float64)


def medians(rows: Sequence[Row], *names: str) -> list[float]:
    return [float(np.median(column(rows, name))) for name in names]


def mean(rows: Sequence[Row], name: str) -> float:
    return float(column(rows, name).mean()) if rows else 0.0


def blocks(values: Array, count: int) -> tuple[Array, float]:
    """Means of ``count`` equal stretches, and the standard error of one."""
    stretches = np.array_split(values, count)
    inside = np.concatenate([stretch - stretch.mean() for stretch in stretches])
    variance = float((inside**2).sum()) / max(1, len(values) - count)
    return np.array([s.mean() for s in stretches]), (variance * count / len(values)) ** 0.5


class Part(NamedTuple):
    """A class or a group over many steps, on average."""

    seen: float  # samples of it in all steps
    samples: float
    weight: float
    removed: float
    loss: float


def parts_of(rows: Sequence[Row], kind: str) -> dict[Hashable, Part]:
    known = [row for row in rows if kind in row.breakdowns]
    sums: dict[Hashable, Array] = {}
    for row in known:
        parts, numbers = row.breakdowns[kind]
        for part, (samples, _, weight, removed, loss) in zip(parts, numbers.tolist(), strict=True):
            seen = samples * row.numbers["samples"]
            added = np.array([seen, samples, weight, removed * seen, loss * seen])
            sums[part] = sums.get(part, 0) + added
    steps = len(known)
    each = {part: (total, [1, steps, steps, total[0], total[0]]) for part, total in sums.items()}
    return {part: Part(*(total / by).tolist()) for part, (total, by) in each.items()}
