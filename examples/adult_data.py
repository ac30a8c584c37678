"""UCI Adult as arrays: features to train on, and the groups to evaluate with, kept apart.

Race and sex are never features. What is fitted (scales, categories) sees the training split alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

DATA = Path(__file__).parent / "data" / "adult.csv.gz"

NUMBERS = ["age", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
# `education` says the same as `education_num`; `fnlwgt` is a weight of the census, no feature.
CATEGORIES = ["workclass", "marital_status", "occupation", "relationship", "native_country"]
SENSITIVE = ["race", "sex"]


@dataclass(frozen=True)
class People:
    """One split of Adult, N people.

    Attributes:
        features: (N, F) float32, standardised numbers and one-hot categories.
        labels: (N,) int64, 1 for an income of more than 50,000 dollars a year.
        groups: N rows with the columns ``race``, ``sex`` and ``income``: for evaluation only.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    groups: pd.DataFrame

    def __len__(self) -> int:
        return len(self.labels)

    def group_of(self, *columns: str) -> pd.Series[str]:
        """The intersectional group of each person, for example ``group_of("race", "sex")``."""
        first, *others = (self.groups[column] for column in columns)
        return first.str.cat(others, sep=", ") if others else first

    def part(self, chosen: NDArray[np.int64] | range) -> People:
        """The people with the given numbers, of shape (M,), in that order."""
        groups = self.groups.iloc[chosen].reset_index(drop=True)
        return People(self.features[chosen], self.labels[chosen], groups)

    def hold_out(self, share: float, seed: int = 0) -> tuple[People, People]:
        """Most of them to train on, and a random share in (0, 1) to choose a model with.

        >>> train, validation = load_adult()[0].hold_out(0.2)
        >>> len(train), len(validation)
        (26049, 6512)
        """
        order = np.random.default_rng(seed).permutation(len(self))
        held = round(share * len(self))
        return self.part(order[held:]), self.part(order[:held])


def read_adult(path: Path | str = DATA) -> pd.DataFrame:
    """One row a person, with the columns as they are shipped; ``split`` says train or test."""
    return pd.read_csv(path)


def load_adult(path: Path | str = DATA) -> tuple[People, People]:
    """The official training split (32,561 people) and test split (16,281 people).

    Missing values are a category of their own; a category that only the test split has is encoded
    as none of the known ones.

    Args:
        path: the CSV file; see ``data/README.md`` for its source and licence.

    >>> train, test = load_adult()
    >>> len(train), len(test), train.features.shape == (len(train), test.features.shape[1])
    (32561, 16281, True)
    >>> list(train.groups), train.group_of("income", "sex")[0]
    (['race', 'sex', 'income'], '<=50K, Male')
    """
    table = read_adult(path)
    table[CATEGORIES] = table[CATEGORIES].fillna("missing")
    encoder = ColumnTransformer(
        [
            ("numbers", StandardScaler(), NUMBERS),
            ("categories", OneHotEncoder(handle_unknown="ignore", sparse_output=False), CATEGORIES),
        ]
    )
    train, test = (
        table[table["split"] == name].reset_index(drop=True) for name in ("train", "test")
    )
    encoder.fit(train)
    return _people(train, encoder), _people(test, encoder)


def _people(table: pd.DataFrame, encoder: ColumnTransformer) -> People:
    return People(
        features=encoder.transform(table).astype(np.float32),
        labels=(table["income"] == ">50K").to_numpy(np.int64),
        groups=table[[*SENSITIVE, "income"]],
    )
