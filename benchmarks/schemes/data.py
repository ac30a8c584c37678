"""The data of this folder's benchmarks, in memory, with the groups that only evaluation sees."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.append(str(Path(__file__).parents[2] / "examples"))


@dataclass(frozen=True)
class Split:
    """N samples on the CPU, with the groupings that only the evaluation sees: codes (N,)."""

    x: Tensor
    y: Tensor
    groups: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> Split:
        groups = {name: codes[index] for name, codes in self.groups.items()}
        return Split(self.x[index], self.y[index], groups)

    def shuffled(self, seed: int) -> Split:
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]


def adult() -> tuple[Split, Split]:
    """UCI Adult, official training and test split."""
    from adult_data import load_adult

    train, test = (
        Split(torch.tensor(p.features), torch.tensor(p.labels), _of_adult(p)) for p in load_adult()
    )
    return train, test


def adult_tokens() -> tuple[Split, Split]:
    """The same people as sequences of ten tokens: one a column, numbers in sixteen quantiles."""
    import adult_data

    table = pd.read_csv(adult_data.DATA)
    first, columns = 0, []
    training = table["split"] == "train"
    for name in adult_data.NUMBERS:
        edges = np.unique(np.quantile(table.loc[training, name], np.linspace(0, 1, 17)[1:-1]))
        columns.append(np.searchsorted(edges, table[name]))
    columns += [pd.factorize(table[c].fillna("missing"))[0] for c in adult_data.CATEGORIES]
    for i, codes in enumerate(columns):
        columns[i] = codes + first
        first += codes.max() + 1
    tokens = torch.from_numpy(np.stack(columns, 1).astype(np.int64))
    people = adult_data.load_adult()
    masks = (torch.tensor(training.to_numpy()), torch.tensor(~training.to_numpy()))
    train, test = (
        Split(tokens[mask], torch.tensor(p.labels), _of_adult(p))
        for mask, p in zip(masks, people, strict=True)
    )
    return train, test


def law_school() -> tuple[Split, Split]:
    """LSAC Law School, passing the bar; from the directory that IRW_OPTIM_DATA names."""
    folder = os.environ.get("IRW_OPTIM_DATA")
    if folder is None:
        raise SystemExit("law: set IRW_OPTIM_DATA to a directory with law_school.csv.gz")
    table = pd.read_csv(Path(folder) / "law_school.csv.gz")
    table["is_part_time"] = (table["is_part_time"] == "Yes").astype(float)
    numbers = table.drop(columns=["sex", "race", "pass_bar", "split"]).astype(float)
    training = table["split"] == "train"
    numbers = (numbers - numbers[training].mean()) / numbers[training].std()
    x = torch.tensor(numbers.to_numpy(np.float32))
    y = torch.tensor(table["pass_bar"].to_numpy(np.int64))
    groups = {
        "label x sex": _cells(table[["pass_bar", "sex"]]),
        "label x race": _cells(table[["pass_bar", "race"]]),
        "race x sex": _cells(table[["race", "sex"]]),
    }
    every = Split(x, y, groups)
    mask = torch.tensor(training.to_numpy())
    return every[mask], every[~mask]


def digits(seed: int) -> tuple[Split, Split]:
    """scikit-learn's 8 x 8 digits, one in ten of them with its colours inverted: two groups."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(seed)
    inverted = torch.rand(len(x), generator=generator) < 0.1
    x[inverted] = 1 - x[inverted]
    every = Split(x, torch.from_numpy(labels).long(), {"inverted": inverted.long()})
    every = every.shuffled(seed)
    return every[:1200], every[1200:]


DATA = {"adult": adult, "law": law_school}


def _of_adult(people: Any) -> dict[str, Tensor]:
    return {
        "label x sex": _cells(people.groups[["income", "sex"]]),
        "race x sex": _cells(people.groups[["race", "sex"]]),
    }


def _cells(columns: pd.DataFrame) -> Tensor:
    return torch.tensor(columns.groupby(list(columns)).ngroup().to_numpy())


class Positions(Dataset[int]):
    """Samples that are their own index: `Gather` then reads a batch by one of them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> int:
        return i


class Gather:
    """A ``collate_fn`` from positions to a batch, as fast as an index can be."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __call__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(positions)
        return self.split.x[index], self.split.y[index]


def loader(split: Split, size: int, **options: Any) -> DataLoader[Any]:
    """Shuffled batches, read from memory."""
    positions, collate = Positions(len(split)), Gather(split)
    return DataLoader(positions, batch_size=size, shuffle=True, collate_fn=collate, **options)


def batches(split: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    for index in order.split(size):
        yield split.x[index], split.y[index]
