"""What one renewal of the global weights costs, in epochs of plain training, and in memory.

Both sides in one process, CPU time of one thread: in every round a plain epoch (forward, backward,
SGD step) and then a renewal each with as many samples at once as the loader's batches have, with
twice and with four times as many; the median of the rounds' ratios. The renewals are those of a
GlobalScheme that has made weights before. "in memory" reads a batch by one index; "sample by
sample" is torch's TensorDataset with its default collation, where reading takes most of the time of
a small model.
"""

import copy
import resource
import statistics
import subprocess
import sys
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import report
from benchmarks.cost.steps import time_ratios
from benchmarks.data.memory import adult, adult_tokens, loader
from benchmarks.data.sources import Samples
from benchmarks.models import Transformer, mlp, small_cnn
from benchmarks.training import step
from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme, global_weights

ALPHA, AT_ONCE = 0.2, (1, 2, 4)


def renewals(
    model: nn.Module, data: DataLoader[Any], batch: int, rounds: int
) -> tuple[float, list[float]]:
    """Seconds of a plain epoch, and renewals in plain epochs for each factor in `AT_ONCE`."""
    plain_model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.01)

    def plain_epoch() -> None:
        for x, y in data:
            step(plain_model, nn.functional.cross_entropy, optimizer, x, y)

    schemes = []
    for factor in AT_ONCE:
        copied = copy.deepcopy(model)
        attached = {"model": copied, "criterion": nn.CrossEntropyLoss()}
        inner = torch.optim.SGD(copied.parameters(), lr=0.01)
        wrapped = IRWOptimizer(inner, alpha=ALPHA, **attached)
        schemes.append(GlobalScheme(wrapped, data, batch_size=factor * batch))
    actions = [scheme.renew for scheme in schemes]
    plain, ratios = time_ratios(plain_epoch, *actions, rounds=rounds)
    return plain, [statistics.median(own) for own in ratios]


def cases(part: int) -> dict[str, tuple[nn.Module, Samples, int]]:
    """Model, data and batch size; a ``part``-th of the data.

    At least 32 batches: with few, the engine's comparisons with autograd weigh more than in use.
    """
    people, sequences = adult()[0][: 8192 // part], adult_tokens()[0][: 2048 // part]
    features, tokens = people.x.shape[1], int(sequences.x.max()) + 1
    images = Samples(torch.randn(2048 // part, 1, 28, 28), torch.randint(0, 10, (2048 // part,)))
    long = Samples(torch.randint(0, 1000, (1024 // part, 64)), torch.randint(0, 2, (1024 // part,)))
    return {
        "MLP 64-32": (mlp(features, 64, 32, 2), people, 128),
        "MLP 512-512": (mlp(features, 512, 512, 2), people, 128),
        "MLP 1024-1024": (mlp(features, 1024, 1024, 2), people, 256),
        "CNN, 28 x 28": (small_cnn(pool=4), images, 64),
        "transformer, 10 x 32": (Transformer(tokens), sequences, 64),
        "transformer, 64 x 128": (Transformer(1000, 128), long, 32),
    }


def by_model(part: int, rounds: int) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = []
    for name, (model, data, batch) in cases(part).items():
        readers = {"in memory": loader(data, batch)}
        if not table:  # reading is the same for all of them; the smallest model feels it most
            samples = TensorDataset(data.x, data.y)
            readers["sample by sample"] = DataLoader(samples, batch_size=batch, shuffle=True)
        for reading, given in readers.items():
            plain, ratios = renewals(model, given, batch, rounds)
            row = {"model": name, "reading": reading, "batch": batch, "plain epoch, s": plain}
            by_factor = zip(AT_ONCE, ratios, strict=True)
            table.append(row | {f"renewal, {k} x batch": own for k, own in by_factor})
            print(list(table[-1].values()), flush=True)
    return table


def by_size(sizes: tuple[int, ...], rounds: int) -> pd.DataFrame:
    """Growth with N of an MLP 64-32, four batches at once."""
    people, rows = adult()[0], []
    for n in sizes:
        model = mlp(people.x.shape[1], 64, 32, 2)
        plain, ratios = renewals(model, loader(people[:n], 128), 128, rounds)
        rows.append({"N": n, "renewal, s": ratios[-1] * plain, "plain epoch, s": plain})
    return pd.DataFrame(rows)


def sizes_table(frame: pd.DataFrame) -> str:
    ratio = frame["renewal, s"] / frame["plain epoch, s"]
    formats = {"N": "{:,}", "renewal, s": "{:.3f}", "plain epoch, s": "{:.3f}", "ratio": "{:.2f}"}
    shown = frame.assign(ratio=ratio).transform({c: text.format for c, text in formats.items()})
    return report.table(list(shown), shown.to_numpy().tolist())


def memory(samples: int) -> float:
    """Growth of the peak memory in MiB while weights of so many samples are made."""
    model, x = mlp(20, 512, 512, 2), torch.randn(samples, 20)

    def make(x: Tensor) -> None:
        data = DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=128)
        global_weights(model, nn.CrossEntropyLoss(), data, ALPHA, progress=False)

    make(x[:256])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_by_size(sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """Each size in a process of its own: a peak does not come down again."""
    parameters = sum(p.numel() for p in mlp(20, 512, 512, 2).parameters())
    grown = []
    for samples in sizes:
        command = [sys.executable, "-m", "benchmarks.cost", "renewal", "--memory", str(samples)]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        row = {"N": samples, "growth of the peak, MiB": round(float(printed))}
        grown.append(row | {"N x P numbers, MiB": samples * parameters * 4 // 2**20})
    return grown


def main(given: list[str]) -> None:
    chosen = report.options(__doc__, given, memory={"type": int, "help": "only print MiB for N"})
    torch.manual_seed(0)
    if chosen.memory:
        print(memory(chosen.memory))
        return
    fast = chosen.fast
    part, rounds, sizes = (16, 1, (500,)) if fast else (1, 7, (8_000, 32_000, 128_000))
    table = by_model(part, rounds)
    growth = by_size((1000,) if fast else (1000, 4000, 16000), rounds)
    report.save("schemes_cost_memory", memory_by_size(sizes), fast)
    report.save("cost_sizes", growth, fast, sizes_table(growth), rounds=rounds)
    report.save("schemes_cost", table, fast, alpha=ALPHA, rounds=rounds)
