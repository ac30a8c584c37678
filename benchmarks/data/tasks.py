"""The tasks by name: which data, and which groupings of it have headroom.

Headroom is what training with group labels gains for the worst-off group over plain training. The
groupings by people alone (race x sex, male x young) have none; those with the label in them have.
"""

from dataclasses import dataclass

from benchmarks.data import planted, unseen
from benchmarks.data.sources import SOURCES, Samples, find, split

Parts = tuple[Samples, Samples, Samples]


@dataclass(frozen=True)
class Task:
    """One data set and what is asked of it.

    ``protected`` is the grouping by people or by what was planted, ``targets`` have headroom, and
    ``table`` is the file it needs; None for data that scikit-learn brings along.
    """

    name: str
    protected: str
    targets: tuple[str, ...]
    table: str | None
    title: str
    classes: int = 2

    def parts(self, seed: int, noise: float = 0.0) -> Parts:
        """Training, validation and test part; ``noise`` as of `split`."""
        if self.name == "coloured_digits":
            return planted.coloured_digits(seed, noise=noise)
        return split(_SOURCES[self.name](), seed, noise=noise)

    @property
    def available(self) -> bool:
        """Whether its data is on this machine."""
        return self.table is None or find(self.table) is not None


_SOURCES = {**SOURCES, **unseen.SOURCES, "marked_adult": planted.marked_adult}
_TASKS = (
    Task("coloured_digits", "label x colour", ("label x colour",), None, "digits"),
    Task("adult", "race x sex", ("label x sex",), "adult", "Adult"),
    Task("law_school", "race x sex", ("label x sex", "label x race"), "law_school", "Law"),
    Task("celeba_blond", "male x young", ("label x male",), "celeba_attributes", "CelebA blond"),
    Task("marked_adult", "mark", ("label x mark",), "adult", "Adult"),
    Task("compas", "race x sex", ("label x race",), "compas", "COMPAS"),
    Task("celeba_hair", "male x young", ("label x male",), "celeba_attributes", "CelebA hair", 4),
)
TASKS = {task.name: task for task in _TASKS}
_BY_SEX_AND_AGE, _BY_RACE_AND_AGE = ("label x sex", "label x age"), ("label x race", "label x age")
_BY_FINANCE_AND_PARENTS = ("label x finance", "label x parents")
_UNSEEN = (
    Task("credit", "sex x age", _BY_SEX_AND_AGE, "UCI_Credit_Card", "credit"),
    Task("german", "sex x age", _BY_SEX_AND_AGE, "german", "German credit"),
    Task("crime", "black", ("label x black",), "crime", "crime"),
    Task("health", "sex x age", _BY_SEX_AND_AGE, "health", "health"),
    Task("sqf", "race x age", _BY_RACE_AND_AGE, "sqf", "stop and frisk"),
    Task("nursery", "finance x parents", _BY_FINANCE_AND_PARENTS, "nursery", "nursery", 4),
    Task("admissions", "gender", ("label x gender",), "admissions", "admissions"),
    Task("blond", "gender", ("label x gender",), "genfaces", "blond"),
    Task("joy", "gender", ("label x gender",), "genfaces", "joy"),
    Task("coloured_nursery", "colour", ("label x colour",), "nursery", "coloured nursery"),
    Task("coloured_health", "colour", ("label x colour",), "health", "coloured health"),
)
UNSEEN = {task.name: task for task in _UNSEEN}
"""Never to be tuned on: nothing that the pages recommend was chosen by a look at these."""
