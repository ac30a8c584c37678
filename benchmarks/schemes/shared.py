"""What the benchmarks of this folder share: data, small models, training, and where results go."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
SMALLEST_CELL = 50
sys.path.append(str(ROOT / "examples"))


# Data -----------------------------------------------------------------------------------------


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


def digits(seed: int = 0) -> tuple[Split, Split]:
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


# Models ---------------------------------------------------------------------------------------


def mlp(inputs: int, *widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 2))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Transformer(nn.Module):
    """Token embeddings, two encoder layers, the mean over the tokens, a linear head."""

    def __init__(self, tokens: int, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


# Evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    training = model.training
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(4096)])
    model.train(training)
    return outputs


def evaluate(outputs: Tensor, split: Split, alpha: float = 0.3) -> dict[str, float]:
    """Accuracy; the worst one of each grouping (cells of 50 samples and more); losses."""
    losses = nn.functional.cross_entropy(outputs, split.y, reduction="none")
    right = (outputs.argmax(1) == split.y).double()
    tail = losses.sort(descending=True).values[: int(alpha * len(split))]
    worst = {
        f"worst {name}": min(
            float(right[codes == cell].mean())
            for cell in codes.unique()
            if (codes == cell).sum() >= SMALLEST_CELL
        )
        for name, codes in (split.groups | {"class": split.y}).items()
    }
    return {
        "accuracy": float(right.mean()),
        **worst,
        "mean loss": float(losses.mean()),
        "tail loss": float(tail.mean()),
    }


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# Time -----------------------------------------------------------------------------------------


def seconds(*actions: Callable[[], object], rounds: int) -> list[float]:
    """Median CPU time of each action, taken in turns: whatever else runs slows all of them."""
    for action in actions:
        action()
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, taken in zip(actions, times, strict=True):
            start = time.process_time()
            action()
            taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in times]


# Results --------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with the keys of all rows as columns; pairs are mean and standard deviation."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = {key for row in rows for key, value in row.items() if isinstance(value, str)}
    lines = [columns, ["---" if key in texts else "---:" for key in columns]]
    lines += [[_cell(key, row.get(key)) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    mean, spread = value if isinstance(value, tuple) else (value, None)
    percent = key.startswith(("accuracy", "worst", "heavier"))
    precise = "variance" in key or "distance" in key
    scale, digits = (100, 1) if percent else (1, 3 if precise else 2)
    text = f"{scale * mean:.{digits}f}"
    return text if spread is None else f"{text} ± {scale * spread:.{digits}f}"


def save(name: str, table: list[dict[str, Any]], fast: bool, **more: Any) -> None:
    """Print a table; write it to benchmarks/results as Markdown, and as JSON with all the rest.

    Nothing is written of a ``fast`` run.
    """
    print("\n" + markdown(table))
    if fast:
        return
    RESULTS.mkdir(exist_ok=True)
    module = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("")
    header = {
        "command": shlex.join(["python", "-m", ".".join(module.parts), *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    text = json.dumps({**header, **more, "table": table}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(markdown(table), encoding="utf-8")
