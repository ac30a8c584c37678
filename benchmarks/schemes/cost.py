"""What one renewal of the global weights costs, in epochs of plain training, and in memory.

    python -m benchmarks.schemes.cost [--fast]

Both sides in one process, CPU time of one thread: in every round a plain epoch (forward, backward,
SGD step) and then a renewal each with as many samples at once as the loader's batches have, with
twice and with four times as many; the median of the rounds' ratios. The renewals are those of a
GlobalScheme that has made weights before. "in memory" reads a batch by one index; "sample by
sample" is torch's TensorDataset with its default collation, where reading takes most of the time of
a small model.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.schemes.data import Split, adult, adult_tokens, loader
from benchmarks.schemes.models import Transformer, cnn, mlp
from benchmarks.schemes.results import markdown, save, time_ratios
from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme, global_weights

ALPHA = 0.2
AT_ONCE = (1, 2, 4)


def renewals(
    model: nn.Module, data: DataLoader[Any], batch: int, rounds: int
) -> tuple[float, dict[int, list[float]]]:
    """Seconds of a plain epoch, and renewals in plain epochs by the factor of the batch size."""
    plain_model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.01)

    def plain_epoch() -> None:
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain_model(x), y).backward()
            optimizer.step()

    schemes = []
    for factor in AT_ONCE:
        copied, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
        wrapped = IRWOptimizer(
            torch.optim.SGD(copied.parameters(), lr=0.01),
            alpha=ALPHA,
            model=copied,
            criterion=criterion,
        )
        schemes.append(GlobalScheme(wrapped, data, batch_size=factor * batch))
    plain, ratios = time_ratios(plain_epoch, *(scheme.renew for scheme in schemes), rounds=rounds)
    return plain, dict(zip(AT_ONCE, ratios, strict=True))


def cases(part: int) -> dict[str, tuple[nn.Module, Split, int]]:
    """Model, data and batch size; a ``part``-th of the data.

    At least 32 batches: with few, the engine's comparisons with autograd weigh more than in use.
    """
    people, sequences = adult()[0][: 8192 // part], adult_tokens()[0][: 2048 // part]
    features, tokens = people.x.shape[1], int(sequences.x.max()) + 1
    pool = nn.AdaptiveAvgPool2d(4)
    return {
        "MLP 64-32": (mlp(features, 64, 32), people, 128),
        "MLP 512-512": (mlp(features, 512, 512), people, 128),
        "MLP 1024-1024": (mlp(features, 1024, 1024), people, 256),
        "CNN, 28 x 28": (
            nn.Sequential(*cnn()[:7], pool, *cnn()[7:]),
            _images(2048 // part),
            64,
        ),
        "transformer, 10 x 32": (Transformer(tokens), sequences, 64),
        "transformer, 64 x 128": (Transformer(1000, 128), _texts(1024 // part, 64), 32),
    }


def _images(number: int) -> Split:
    return Split(torch.randn(number, 1, 28, 28), torch.randint(0, 10, (number,)), {})


def _texts(number: int, length: int) -> Split:
    return Split(torch.randint(0, 1000, (number, length)), torch.randint(0, 2, (number,)), {})


def memory(samples: int) -> None:
    """Print the growth of the peak memory while weights of so many samples are made."""
    x = torch.randn(samples, 20)
    data = loader_of(x)
    model = mlp(20, 512, 512)
    global_weights(model, nn.CrossEntropyLoss(), loader_of(x[:256]), ALPHA, progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    global_weights(model, nn.CrossEntropyLoss(), data, ALPHA, progress=False)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def loader_of(x: torch.Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=128)


def memory_by_size(sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """Each size in a process of its own: a peak does not come down again."""
    parameters = sum(p.numel() for p in mlp(20, 512, 512).parameters())
    grown = []
    for samples in sizes:
        command = [sys.executable, "-m", __spec__.name, "--memory", str(samples)]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        row = {"N": samples, "growth of the peak, MiB": round(float(printed))}
        grown.append(row | {"N x P numbers, MiB": samples * parameters * 4 // 2**20})
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a sixteenth of the data, one round")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.memory:
        memory(arguments.memory)
        return

    part, rounds, sizes = (16, 1, (500,)) if arguments.fast else (1, 7, (8_000, 32_000, 128_000))
    table: list[dict[str, Any]] = []
    by_round = []
    for name, (model, split, batch) in cases(part).items():
        readers = {"in memory": loader(split, batch)}
        if not table:  # reading is the same for all of them; the smallest model feels it most
            samples = TensorDataset(split.x, split.y)
            readers["sample by sample"] = DataLoader(samples, batch_size=batch, shuffle=True)
        for reading, data in readers.items():
            plain, ratios = renewals(model, data, batch, rounds)
            row = {"model": name, "reading": reading, "batch": batch, "plain epoch, s": plain}
            row |= {f"renewal, {k} x batch": statistics.median(v) for k, v in ratios.items()}
            table.append(row)
            by_round.append({"model": name, "reading": reading, "ratios": ratios})
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
    grown = memory_by_size(sizes)
    print(markdown(grown))
    save(
        "schemes_cost",
        table,
        arguments.fast,
        seeds=[0],
        alpha=ALPHA,
        rounds=rounds,
        by_round=by_round,
        memory=grown,
    )


if __name__ == "__main__":
    main()
