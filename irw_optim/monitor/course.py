"""The rows of a training: kept in bounded memory, and seen as a whole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from irw_optim.monitor.rows import Array, Row


class History:
    """The first row, and the newest at every interval: the whole course, ever more thinly.

    A ring of the newest rows would forget how a training began, which is what its present is
    compared with. So when the memory is full every second row is let go and the interval doubles:
    with capacity C and n steps there are C/2 to C evenly spaced rows, and about
    C (1 + log2(n/C) / 2) were ever made, so that the cost a step falls as the training goes on.
    """

    def __init__(self, every: int, capacity: int) -> None:
        self.interval = every
        self.capacity = capacity
        self.rows: list[Row] = []

    def due(self, step: int) -> bool:
        """Whether a row of this step is wanted."""
        return not self.rows or step % self.interval == 0

    def add(self, row: Row) -> None:
        """Take a row; where the training went back to a checkpoint, what came after it goes."""
        while self.rows and self.rows[-1].step >= row.step:
            self.rows.pop()
        self.rows.append(row)
        while len(self.rows) > self.capacity:
            self.interval *= 2
            first, *others = self.rows
            self.rows = [first, *(r for r in others if r.step % self.interval == 0)]


class Course:
    """The rows of a training: all, those after the warm-up, and the later half of these."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.weighted = [row for row in self.rows if row.numbers["weighted"]]
        self.recent = self.weighted[len(self.weighted) // 2 :]

    def recent_with(self, *, held: bool) -> list[Row]:
        """The recent rows whose weights a global scheme held, or those whose step made its own."""
        return [row for row in self.recent if np.isnan(row.numbers["held_for"]) != held]

    @property
    def steps(self) -> Array:
        """The numbers of the steps, (rows,)."""
        return np.array([row.step for row in self.rows])


def column(rows: Sequence[Row], name: str) -> Array:
    """One number of each row, float64."""
    return np.array([row.numbers[name] for row in rows], dtype=np.float64)


def medians(rows: Sequence[Row], *names: str) -> list[float]:
    """The median of each of these columns."""
    return [float(np.median(column(rows, name))) for name in names]


def mean(rows: Sequence[Row], name: str) -> float:
    """The mean of a column; 0 without rows."""
    return float(column(rows, name).mean()) if rows else 0.0


def blocks(values: Array, count: int) -> tuple[Array, float]:
    """Means of ``count`` stretches of equal length, and the standard error of one such mean.

    The error is that of the scatter inside the stretches.

    >>> blocks(np.array([1.0, 3.0, 1.0, 3.0]), 2)
    (array([2., 2.]), 1.0)
    """
    stretches = np.array_split(values, count)
    inside = np.concatenate([stretch - stretch.mean() for stretch in stretches])
    variance = float((inside**2).sum()) / max(1, len(values) - count)
    return np.array([s.mean() for s in stretches]), (variance * count / len(values)) ** 0.5


class Part(NamedTuple):
    """A class or a group over many steps.

    How many of its samples were seen; its shares of the samples and of the weight, averaged over
    the steps; the share of it that was removed, and its mean loss.
    """

    seen: float
    samples: float
    weight: float
    removed: float
    loss: float


def parts_of(rows: Sequence[Row], kind: str) -> dict[Hashable, Part]:
    """Each class or group (``kind``) over the rows that know it, in the order of first sight."""
    known = [row for row in rows if kind in row.breakdowns]
    sums: dict[Hashable, Array] = {}
    for row in known:
        parts, numbers = row.breakdowns[kind]
        for part, (samples, _, weight, removed, loss) in zip(parts, numbers.tolist(), strict=True):
            seen = samples * row.numbers["samples"]
            added = np.array([seen, samples, weight, removed * seen, loss * seen])
            sums[part] = sums.get(part, 0) + added
    return {
        part: Part(seen, samples / len(known), weight / len(known), removed / seen, loss / seen)
        for part, total in sums.items()
        for seen, samples, weight, removed, loss in [total.tolist()]
    }
