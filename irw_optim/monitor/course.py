"""The rows of a training seen as a whole: columns over time, and parts summed over steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from irw_optim.monitor.rows import OF_A_PART, Array, Row


class Part(NamedTuple):
    """A class or a group over many steps.

    Attributes:
        seen: number of samples.
        samples: share of the samples, averaged over the steps.
        worst_off: share of S.
        weight: share of the weight.
        removed: share of its samples that the outlier filter removed.
        loss: mean loss.
    """

    seen: float
    samples: float
    worst_off: float
    weight: float
    removed: float
    loss: float


class Course:
    """The recorded rows of a training, in order.

    Attributes:
        rows: all of them.
        weighted: those after the warm-up.
        recent: the later half of these, which show the training as it is now.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.weighted = [row for row in self.rows if row.numbers["weighted"]]
        self.recent = self.weighted[len(self.weighted) // 2 :]

    @property
    def recent_local(self) -> list[Row]:
        """The recent rows whose weights were made in their step."""
        return [row for row in self.recent if np.isnan(row.numbers["held_for"])]

    @property
    def recent_held(self) -> list[Row]:
        """The recent rows whose weights a global scheme held."""
        return [row for row in self.recent if not np.isnan(row.numbers["held_for"])]

    @property
    def steps(self) -> Array:
        """The numbers of the steps, (rows,)."""
        return np.array([row.step for row in self.rows])


def column(rows: Sequence[Row], name: str) -> Array:
    """One number of each row, float64."""
    return np.array([row.numbers[name] for row in rows], dtype=np.float64)


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


def parts_of(rows: Sequence[Row], kind: str) -> dict[Hashable, Part]:
    """Each class or group (``kind``) over the rows that know it, in the order of first sight."""
    known = [row for row in rows if kind in row.breakdowns]
    sums: dict[Hashable, Array] = {}
    for row in known:
        size = row.numbers["samples"]
        for part, shares in zip(*row.breakdowns[kind], strict=True):
            own = dict(zip(OF_A_PART, shares, strict=True))
            count = own["samples"] * size
            added = [own["samples"], own["worst_off"], own["weight"]]
            added += [count, own["removed"] * count, own["loss"] * count]
            sums[part] = sums.get(part, 0) + np.array(added)
    return {part: _average(total.tolist(), len(known)) for part, total in sums.items()}


def _average(total: list[float], steps: int) -> Part:
    samples, worst_off, weight, count, removed, loss = total
    shares = samples / steps, worst_off / steps, weight / steps
    return Part(count, *shares, removed / count, loss / count)
