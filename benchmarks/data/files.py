"""Where the tables are: the directory that IRW_OPTIM_DATA names, and what is shipped."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

VARIABLE = "IRW_OPTIM_DATA"
SHIPPED = Path(__file__).parents[2] / "examples" / "data"
WHAT = {
    "adult": "UCI Adult, as in examples/data (where it is shipped)",
    "compas": "the table compas-scores-two-years.csv of ProPublica's compas-analysis",
    "law_school": "the bar passage study of the LSAC (Wightman 1998), one row a person",
    "celeba_attributes": "list_attr_celeba of CelebA (Liu et al. 2015), 0/1, names in lower case",
}
"""What to put there."""


def read(stem: str) -> pd.DataFrame:
    """The table ``<stem>.csv.gz`` or ``<stem>.csv``; Adult's is shipped."""
    path = find(stem)
    if path is not None:
        return pd.read_csv(path)
    folder = os.environ.get(VARIABLE)
    where = f"{VARIABLE}={folder!r} has none" if folder else f"{VARIABLE} is not set"
    raise FileNotFoundError(
        f"{stem}.csv.gz: {where}; expected a directory with that file: export "
        f"{VARIABLE}=/path/to/data, and put there {WHAT.get(stem, 'it')} "
        "(benchmarks/README.md has the columns)"
    )


def find(stem: str) -> Path | None:
    """The file of a table in the data directory, or in what the project ships."""
    folder = os.environ.get(VARIABLE)
    folders = [*([Path(folder)] if folder else []), SHIPPED]
    paths = [place / f"{stem}{end}" for place in folders for end in (".csv.gz", ".csv")]
    return next((path for path in paths if path.is_file()), None)
