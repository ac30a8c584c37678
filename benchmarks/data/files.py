"""Where the tables are: the directory that IRW_OPTIM_DATA names, what is shipped, OpenML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

VARIABLE = "IRW_OPTIM_DATA"
SHIPPED = Path(__file__).parents[2] / "examples" / "data"
NOT_ON_OPENML = {
    "compas": "the table compas-scores-two-years.csv of ProPublica's compas-analysis",
    "law_school": "the bar passage study of the LSAC (Wightman 1998), one row a person",
    "celeba_attributes": "list_attr_celeba of CelebA (Liu et al. 2015), 0/1, names in lower case",
}
"""What to put there, where scikit-learn cannot fetch it: with these people, columns and target."""


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
        f"{stem}.csv.gz: {where}, and OpenML has no such set; expected a directory with that file: "
        f"export {VARIABLE}=/path/to/data, and put there {NOT_ON_OPENML.get(stem, 'it')} "
        "(benchmarks/README.md has the columns)"
    )


def find(stem: str) -> Path | None:
    """The file of a table in the data directory, or in what the project ships."""
    folder = os.environ.get(VARIABLE)
    folders = [*([Path(folder)] if folder else []), SHIPPED]
    paths = [place / f"{stem}{end}" for place in folders for end in (".csv.gz", ".csv")]
    return next((path for path in paths if path.is_file()), None)


def adult_from_openml() -> pd.DataFrame:
    """Adult by scikit-learn from OpenML (version 2), with the column names used here."""
    from sklearn.datasets import fetch_openml

    fetched: Any = fetch_openml("adult", version=2, as_frame=True)
    table = fetched.frame.rename(columns=lambda name: name.replace("-", "_"))
    texts = table.select_dtypes("category").columns
    table[texts] = table[texts].astype(object)
    return table.rename(columns={"class": "income"})
