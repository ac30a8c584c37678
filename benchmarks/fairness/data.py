"""The data sets: tables in, a training, a validation and a test part out.

    train, validation, test = split(load("adult"), seed=0)

Sensitive columns are never features: they make the groups, which evaluation and the oracles see.
Everything that is fitted (scales, categories, imputation) sees the training part alone. Every seed
splits anew, so that a spread over the seeds includes who happens to be in the test part.

All files but Adult's come from the directory that the variable IRW_OPTIM_DATA names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

VARIABLE = "IRW_OPTIM_DATA"
SHIPPED = Path(__file__).parents[2] / "examples" / "data"


@dataclass(frozen=True)
class Samples:
    """N samples.

    Attributes:
        x: (N, F) float32.
        y: (N,) int64 classes from 0.
        groups: for each grouping the number of each sample's group, (N,) int64.
        names: for each grouping what the numbers mean.
    """

    x: Tensor
    y: Tensor
    groups: dict[str, Tensor]
    names: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Tensor) -> Samples:
        groups = {name: codes[index] for name, codes in self.groups.items()}
        return replace(self, x=self.x[index], y=self.y[index], groups=groups)

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


@dataclass(frozen=True)
class Source:
    """A data set as it was read, N rows.

    Attributes:
        name: of the data set.
        features: the columns to predict from.
        numbers: those of them that are numbers; the others are categories.
        label: (N,) classes from 0.
        sensitive: the columns that make groups.
        groupings: columns of ``sensitive`` and "label", by the name of the grouping.
    """

    name: str
    features: pd.DataFrame
    numbers: list[str]
    label: pd.Series
    sensitive: pd.DataFrame
    groupings: dict[str, list[str]]


@dataclass(frozen=True)
class Sizes:
    """At most so many samples, and at most that share of what there is; the test has the rest."""

    train: int = 8000
    validation: int = 4000
    test: int = 20000
    train_share: float = 0.5
    validation_share: float = 0.2

    def of(self, size: int) -> tuple[int, int, int]:
        train = min(self.train, int(self.train_share * size))
        validation = min(self.validation, int(self.validation_share * size))
        return train, validation, min(self.test, size - train - validation)


def split(
    source: Source, seed: int, sizes: Sizes | None = None
) -> tuple[Samples, Samples, Samples]:
    """Training, validation and test part, drawn at random by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(source.label))
    train, validation, test = (sizes or Sizes()).of(len(order))
    parts = np.split(order[: train + validation + test], [train, train + validation])
    encoder = preprocessing(source).fit(source.features.iloc[parts[0]])
    x = encoder.transform(source.features.iloc[np.concatenate(parts)])
    groups, names = group_codes(source)
    every = Samples(
        torch.from_numpy(np.asarray(x, np.float32)),
        torch.from_numpy(source.label.to_numpy(np.int64)[np.concatenate(parts)]),
        {name: codes[np.concatenate(parts)] for name, codes in groups.items()},
        names,
    )
    first, second, third = torch.arange(len(every)).split([len(part) for part in parts])
    return every[first], every[second], every[third]


def preprocessing(source: Source) -> ColumnTransformer:
    """Standardised numbers (missing: the median, and a flag) and one-hot categories."""
    categories = [column for column in source.features if column not in source.numbers]
    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    one_hot = OneHotEncoder(
        min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    return ColumnTransformer(
        [("numbers", numbers, source.numbers), ("categories", one_hot, categories)]
    )


def group_codes(source: Source) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """For each grouping the group of each row, and the groups' names."""
    columns = source.sensitive.assign(label=source.label)
    codes, names = {}, {}
    for name, chosen in source.groupings.items():
        first, *others = (columns[column].astype(str) for column in chosen)
        cells = first.str.cat(others, sep=", ") if others else first
        numbers, values = pd.factorize(cells, sort=True)
        codes[name], names[name] = torch.from_numpy(numbers.astype(np.int64)), list(values)
    return codes, names


# The data sets --------------------------------------------------------------------------------


def adult() -> Source:
    """UCI Adult (Becker, Kohavi 1996; CC BY 4.0): an income of more than 50,000 dollars a year."""
    table = read("adult")
    numbers = ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
    # `education` says the same as `education_num`; `fnlwgt` is a weight of the census, no feature.
    categories = ["workclass", "marital_status", "occupation", "relationship", "native_country"]
    return Source(
        "adult",
        table[numbers].join(table[categories].fillna("missing")),
        numbers,
        table["income"].eq(">50K").astype(int),
        table[["race", "sex"]],
        by_race_and_sex(),
    )


def compas() -> Source:
    """ProPublica's COMPAS data of Broward County: a new offence within two years."""
    table = read("compas")
    counts = ["juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"]
    numbers = ["age", *counts, "days_b_screening_arrest"]
    categories = ["c_charge_degree", "c_charge_desc"]
    return Source(
        "compas",
        table[numbers].join(table[categories].fillna("missing")),
        numbers,
        table["two_year_recid"],
        table[["race", "sex"]],
        by_race_and_sex(),
    )


def law_school() -> Source:
    """LSAC National Longitudinal Bar Passage Study (Wightman 1998): passing the bar."""
    table = read("law_school")
    numbers = ["zfygpa", "zgpa", "dob_year", "weighted_lsat_ugpa", "cluster_tier"]
    numbers += ["family_income", "lsat", "ugpa"]
    return Source(
        "law_school",
        table[[*numbers, "is_part_time"]],
        numbers,
        table["pass_bar"],
        table[["race", "sex"]],
        by_race_and_sex(),
    )


HAIR = ["black_hair", "blond_hair", "brown_hair", "gray_hair"]


def celeba_blond() -> Source:
    """CelebA (Liu et al. 2015; annotations, non-commercial research): blond hair or not."""
    table = read("celeba_attributes")
    return _celeba("celeba_blond", table, table["blond_hair"])


def celeba_hair() -> Source:
    """CelebA: which of four hair colours, of those with exactly one of them."""
    table = read("celeba_attributes")
    table = table[table[HAIR].sum(axis=1) == 1].reset_index(drop=True)
    return _celeba("celeba_hair", table, pd.Series(table[HAIR].to_numpy().argmax(1)))


def _celeba(name: str, table: pd.DataFrame, label: pd.Series) -> Source:
    # A hair colour is (part of) the answer to a question about hair colours.
    features = table.drop(columns=["image_id", "male", "young", *HAIR])
    groupings = {
        "male x young": ["male", "young"],
        "label x male": ["label", "male"],
        "label x young": ["label", "young"],
    }
    sensitive = table[["male", "young"]]
    return Source(name, features, list(features), label, sensitive, groupings)


def by_race_and_sex() -> dict[str, list[str]]:
    return {
        "race x sex": ["race", "sex"],
        "label x sex": ["label", "sex"],
        "label x race": ["label", "race"],
    }


SOURCES: dict[str, Callable[[], Source]] = {
    "adult": adult,
    "compas": compas,
    "law_school": law_school,
    "celeba_blond": celeba_blond,
    "celeba_hair": celeba_hair,
}


def load(name: str) -> Source:
    """The data set of that name.

    Raises:
        ValueError: no data set has that name.
        FileNotFoundError: its file is not there; the message says where it is looked for.
    """
    if name not in SOURCES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[name]()


# Reading --------------------------------------------------------------------------------------


def read(stem: str) -> pd.DataFrame:
    """The table ``<stem>.csv.gz`` or ``<stem>.csv``; Adult also from the examples and OpenML."""
    path = find(stem)
    if path is not None:
        return pd.read_csv(path)
    if stem == "adult":
        return adult_from_openml()
    folder = os.environ.get(VARIABLE)
    where = f"{VARIABLE}={folder!r} has none" if folder else f"{VARIABLE} is not set"
    raise FileNotFoundError(
        f"{stem}.csv.gz: {where}; expected a directory with that file: "
        f"export {VARIABLE}=/path/to/data (benchmarks/fairness/README.md says where the data "
        "comes from, and its columns)"
    )


def find(stem: str) -> Path | None:
    """The file of a table in the data directory, or in what the project ships."""
    folder = os.environ.get(VARIABLE)
    folders = [Path(folder)] if folder else []
    candidates = [
        place / f"{stem}{suffix}" for place in [*folders, SHIPPED] for suffix in (".csv.gz", ".csv")
    ]
    return next((path for path in candidates if path.is_file()), None)


def available(name: str) -> bool:
    """Whether the files of a data set are on this machine."""
    return find("celeba_attributes" if name.startswith("celeba") else name) is not None


def adult_from_openml() -> pd.DataFrame:
    """Adult by scikit-learn from OpenML (version 2), with the column names used here.

    COMPAS and Law School are on OpenML with other people, columns and targets, CelebA's attributes
    are not: those three are read from files only.
    """
    from sklearn.datasets import fetch_openml

    fetched: Any = fetch_openml("adult", version=2, as_frame=True)
    table = fetched.frame.rename(columns=lambda name: name.replace("-", "_"))
    texts = table.select_dtypes("category").columns
    table[texts] = table[texts].astype(object)
    return table.rename(columns={"class": "income"})
