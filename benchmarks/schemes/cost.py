"""What one renewal of the global weights costs, in epochs of plain training, and in memory.

    python -m benchmarks.schemes.cost [--fast]

Both sides in one process and in turns, CPU time of one thread, ratio of medians. The renewals are
those of a GlobalScheme that has made weights before, with as many samples at once as the loader's
batches have, and with two and four times as many. "in memory" reads a batch by one index; "sample
by sample" is torch's TensorDataset with its default collation, where reading takes most of the time
of a small model.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.schemes.shared import (
    Split,
    Transformer,
    adult,
    adult_tokens,
    cnn,
    loader,
    markdown,
    mlp,
    save,
    seconds,
)
from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme, global_weights

ALPHA = 0.2
AT_ONCE = (1, 2, 4)


def ratios(
    model: nn.Module, data: DataLoader, batch: int, rounds: int
) -> tuple[float, dict[int, float]]:
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
    plain, *renewed = seconds(plain_epoch, *(scheme.renew for scheme in schemes), rounds=rounds)
    return plain, dict(zip(AT_ONCE, (time / plain for time in renewed), strict=True))


def cases(fast: bool) -> dict[str, tuple[nn.Module, Split, int]]:
    size = 2_000 if fast else 16_000
    people, sequences = adult()[0][:size], adult_tokens()[0][: size // 4]
    number = size // 10
    images = Split(torch.randn(number, 1, 28, 28), torch.randint(0, 10, (number,)), {})
    small_cnn = nn.Sequential(*cnn()[:7], nn.AdaptiveAvgPool2d(4), *cnn()[7:])
    features = people.x.shape[1]
    return {
        "MLP 64-32, Adult": (mlp(features, 64, 32), people, 128),
        "MLP 512-512, Adult": (mlp(features, 512, 512), people, 128),
        "CNN, 28 x 28": (small_cnn, images, 64),
        "transformer, Adult": (Transformer(int(sequences.x.max()) + 1), sequences, 64),
    }


def memory(samples: int) -> None:
    """Print the growth of the peak memory while weights of so many samples are made."""
    x = torch.randn(samples, 20)
    data = loader_of(x)
    model = mlp(20, 512, 512)
    global_weights(model, nn.CrossEntropyLoss(), loader_of(x[:256]), ALPHA, progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    global_weights(model, nn.CrossEntropyLoss(), data, ALPHA, progress=False)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def loader_of(x: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="an eighth of the data, 3 rounds")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.memory:
        memory(arguments.memory)
        return

    rounds = 3 if arguments.fast else 7
    table = []
    for name, (model, split, batch) in cases(arguments.fast).items():
        readers = {"in memory": loader(split, batch)}
        if len(table) == 0:  # reading is the same for all of them; the smallest model feels it most
            samples = TensorDataset(split.x, split.y)
            readers["sample by sample"] = DataLoader(samples, batch_size=batch, shuffle=True)
        for reading, data in readers.items():
            plain, renewals = ratios(model, data, batch, rounds)
            row = {"model": name, "reading": reading, "batch": batch, "plain epoch, s": plain}
            table.append(row | {f"renewal, {k} x batch": v for k, v in renewals.items()})
            print(name, reading, {k: round(v, 2) for k, v in renewals.items()}, flush=True)

    grown = []
    parameters = sum(p.numel() for p in mlp(20, 512, 512).parameters())
    for samples in (2_000, 8_000) if arguments.fast else (8_000, 32_000, 128_000):
        command = [sys.executable, "-m", __spec__.name, "--memory", str(samples)]
        printed = subprocess.run(command, capture_output=True, check=True).stdout
        grown.append(
            {
                "N": samples,
                "growth of the peak, MiB": round(float(printed)),
                "N x P numbers, MiB": samples * parameters * 4 // 2**20,
            }
        )
    print(markdown(grown))
    save(
        "schemes_cost",
        table,
        arguments.fast,
        seeds=[0],
        alpha=ALPHA,
        rounds=rounds,
        memory=grown,
    )


if __name__ == "__main__":
    main()
