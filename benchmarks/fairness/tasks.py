"""The tasks by name: which data, and which groupings of it have headroom.

Headroom is what training with group labels gains for the worst-off group over plain training. The
groupings by people alone (race x sex, male x young) have none; those with the label in them have.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.fairness import planted
from benchmarks.fairness.data import Samples, available, load, split

Parts = tuple[Samples, Samples, Samples]


@dataclass(frozen=True)
class Task:
    """One data set and what is asked of it.

    Attributes:
        protected: the grouping by people, or by what was planted.
        targets: the groupings with headroom.
    """

    name: str
    protected: str
    targets: tuple[str, ...]

    def parts(self, seed: int) -> Parts:
        """Training, validation and test part."""
        if self.name == "coloured_digits":
            return planted.coloured_digits(seed)
        source = planted.marked_adult() if self.name == "marked_adult" else load(self.name)
        return split(source, seed)

    @property
    def available(self) -> bool:
        """Whether its data is on this machine."""
        if self.name == "coloured_digits":
            return True
        return available(self.name.removeprefix("marked_"))


TASKS = {
    task.name: task
    for task in (
        Task("coloured_digits", "label x colour", ("label x colour",)),
        Task("adult", "race x sex", ("label x sex",)),
        Task("law_school", "race x sex", ("label x sex", "label x race")),
        Task("celeba_blond", "male x young", ("label x male",)),
        Task("marked_adult", "mark", ("label x mark",)),
        Task("compas", "race x sex", ("label x race",)),
        Task("celeba_hair", "male x young", ("label x male",)),
    )
}
