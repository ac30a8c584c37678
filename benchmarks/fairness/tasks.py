"""The tasks by name: which data, and which groupings of it have headroom.

Headroom is what training with group labels gains for the worst-off group over plain training. The
groupings by people alone (race x sex, male x young) have none; those with the label in them have.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.fairness import planted
from benchmarks.fairness.data import Samples, load, split
from benchmarks.fairness.files import find

Parts = tuple[Samples, Samples, Samples]


@dataclass(frozen=True)
class Task:
    """One data set and what is asked of it.

    Attributes:
        protected: the grouping by people, or by what was planted.
        targets: the groupings with headroom.
        table: the file it needs; None for data that scikit-learn brings along.
        classes: how many.
    """

    name: str
    protected: str
    targets: tuple[str, ...]
    table: str | None
    classes: int = 2

    def parts(self, seed: int, noise: float = 0.0) -> Parts:
        """Training, validation and test part; ``noise`` as of `split`."""
        if self.name == "coloured_digits":
            return planted.coloured_digits(seed, noise=noise)
        source = planted.marked_adult() if self.name == "marked_adult" else load(self.name)
        return split(source, seed, noise=noise)

    @property
    def available(self) -> bool:
        """Whether its data is on this machine."""
        return self.table is None or find(self.table) is not None


TASKS = {
    task.name: task
    for task in (
        Task("coloured_digits", "label x colour", ("label x colour",), None),
        Task("adult", "race x sex", ("label x sex",), "adult"),
        Task("law_school", "race x sex", ("label x sex", "label x race"), "law_school"),
        Task("celeba_blond", "male x young", ("label x male",), "celeba_attributes"),
        Task("marked_adult", "mark", ("label x mark",), "adult"),
        Task("compas", "race x sex", ("label x race",), "compas"),
        Task("celeba_hair", "male x young", ("label x male",), "celeba_attributes", 4),
    )
}
