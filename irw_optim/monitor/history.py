"""Rows of a training of any length in bounded memory: the whole course, ever more thinly.

A ring of the newest rows would forget how a training began, which is what its present is compared
with. So when the memory is full every second row is let go and the interval doubles: with capacity
C and n steps there are C/2 to C evenly spaced rows and about C (1 + log2(n/C) / 2) were ever made,
so that the cost a step falls as the training goes on.
"""

from __future__ import annotations

from irw_optim.monitor.rows import Row


class History:
    """The first row, and the newest at every interval.

    Args:
        every: interval in steps, to begin with.
        capacity: most rows, >= 2.

    Attributes:
        interval: steps between rows now.
        rows: in order of their steps.
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
