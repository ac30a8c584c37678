"""Where the tables are: the directory that IRW_OPTIM_DATA names, what is shipped, OpenML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

VARIABLE = "IRW_OPTIM_DATA"
SHIPPED = Path(__file__).parents[2] / "examples" / "data"


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
