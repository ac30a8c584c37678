"""Data in memory with its official split, ways to read it, and batches without end."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from adult_data import CATEGORIES, NUMBERS, load_adult
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.data.sources import Samples, read


def adult() -> tuple[Samples, Samples]:
    """UCI Adult as the examples read it, official training and test split."""
    return tuple(
        Samples(torch.tensor(p.features), torch.tensor(p.labels), _of_adult(p.groups))
        for p in load_adult()
    )


def adult_tokens() -> tuple[Samples, Samples]:
    """The same people as sequences of ten tokens: one a column, numbers in sixteen quantiles."""
    table, first, columns = read("adult"), 0, []
    training = table["split"] == "train"
    for name in NUMBERS:
        edges = np.unique(np.quantile(table.loc[training, name], np.linspace(0, 1, 17)[1:-1]))
        columns.append(np.searchsorted(edges, table[name]))
    columns += [pd.factorize(table[c].fillna("missing"))[0] for c in CATEGORIES]
    for i, codes in enumerate(columns):
        columns[i] = codes + first
        first += codes.max() + 1
    tokens = torch.from_numpy(np.stack(columns, 1).astype(np.int64))
    labels = torch.tensor((table["income"] == ">50K").to_numpy(np.int64))
    return tuple(
        Samples(tokens[mask], labels[mask], _of_adult(table[own]))
        for own in (training, ~training)
        for mask in [torch.tensor(own.to_numpy())]
    )


def law_school() -> tuple[Samples, Samples]:
    """LSAC Law School, passing the bar, official split."""
    table = read("law_school")
    table["is_part_time"] = (table["is_part_time"] == "Yes").astype(float)
    numbers = table.drop(columns=["sex", "race", "pass_bar", "split"]).astype(float)
    training = table["split"] == "train"
    numbers = (numbers - numbers[training].mean()) / numbers[training].std()
    x, y = numbers.to_numpy(np.float32), table["pass_bar"].to_numpy(np.int64)
    groupings = {"label x sex": ["pass_bar", "sex"], "label x race": ["pass_bar", "race"]}
    groups = {n: _cells(table[c]) for n, c in {**groupings, "race x sex": ["race", "sex"]}.items()}
    every = Samples(torch.tensor(x), torch.tensor(y), groups)
    mask = torch.tensor(training.to_numpy())
    return every[mask], every[~mask]


def digits(seed: int) -> tuple[Samples, Samples]:
    """scikit-learn's 8 x 8 digits, one in ten of them with its colours inverted: two groups."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16).float().view(-1, 1, 8, 8)
    inverted = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < 0.1
    x[inverted] = 1 - x[inverted]
    every = Samples(x, torch.from_numpy(labels).long(), {"inverted": inverted.long()})
    every = every.shuffled(seed)
    return every[:1200], every[1200:]


OFFICIAL = {"adult": adult, "law": law_school}


def _of_adult(columns: pd.DataFrame) -> dict[str, Tensor]:
    groupings = {"label x sex": ["income", "sex"], "race x sex": ["race", "sex"]}
    return {name: _cells(columns[chosen]) for name, chosen in groupings.items()}


def _cells(columns: pd.DataFrame) -> Tensor:
    return torch.tensor(columns.groupby(list(columns)).ngroup().to_numpy())


# Batches --------------------------------------------------------------------------------------


def loader(data: Samples, size: int, **options: Any) -> DataLoader[Any]:
    """Shuffled batches, read from memory by one index: as fast as reading can be."""

    def gather(positions: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(positions)
        return data.x[index], data.y[index]

    positions: Any = range(len(data))
    return DataLoader(positions, batch_size=size, shuffle=True, collate_fn=gather, **options)


def batches(data: Samples, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    for index in order.split(size):
        yield data.x[index], data.y[index]


def shuffled(size: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices, epoch after epoch in random order; an incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, size)
    while True:
        order = torch.randperm(size, generator=generator)
        yield from order[: size - size % batch].split(batch)


def drawn(weights: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Independent draws in proportion to ``weights``, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.multinomial(weights, batch, replacement=True, generator=generator)
