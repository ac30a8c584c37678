"""Time of a private step: DP-IRW in ghost mode against Opacus' own ghost clipping.

All ways run in turn within one process, and what is reported is the ratio of a way's step to that
of Opacus' ghost clipping in the same round, its median and quartiles over the rounds: a ratio means
something on a busy machine, a time does not. A step is zero_grad, forward, backward and step.

    python benchmarks/private_ghost.py            # minutes
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim.privacy import IRWDPConfig, IRWPrivacyEngine

CLASSES = 10
REFERENCE = "Opacus ghost"


class Block(nn.Module):
    """A transformer block that keeps the batch in dimension 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(width, heads, batch_first=True)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        a = self.before(h)
        h = h + self.attention(a, a, a, need_weights=False)[0]
        return h + self.feed_forward(self.between(h))


class Mean(nn.Module):
    """The mean over the sequence."""

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(100, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, CLASSES),
    )


def transformer() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(1000, 128), Block(128, 4), Block(128, 4), Mean(), nn.Linear(128, CLASSES)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP 100-256-256-10, B 256": (lambda: mlp(256), lambda: torch.randn(256, 100)),
    "MLP 100-1024-1024-10, B 64": (lambda: mlp(1024), lambda: torch.randn(64, 100)),
    "CNN with GroupNorm, 32 x 32, B 64": (cnn, lambda: torch.randn(64, 3, 32, 32)),
    "transformer, 2 blocks of 128, T 64, B 32": (
        transformer,
        lambda: torch.randint(1000, (32, 64)),
    ),
}


def opacus(mode: str, model: nn.Module, loader: Any, criterion: nn.Module) -> tuple[Any, ...]:
    returned = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        data_loader=loader,
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    return (*returned[:2], returned[2] if mode == "ghost" else criterion)


def dp_irw(
    mode: str, config: IRWDPConfig, model: nn.Module, loader: Any, criterion: nn.Module
) -> tuple[Any, ...]:
    model, optimizer, _ = IRWPrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        data_loader=loader,
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        irw=config,
    )
    return model, optimizer, criterion


def plain(model: nn.Module, loader: Any, criterion: nn.Module) -> tuple[Any, ...]:
    return model, torch.optim.SGD(model.parameters(), lr=1e-3), criterion


DEFAULT = IRWDPConfig(init_threshold=math.log(CLASSES))
THRESHOLD_ONLY = IRWDPConfig(init_threshold=math.log(CLASSES), direction_share=0.0, floor=0.3)
WAYS: dict[str, Callable[..., tuple[Any, ...]]] = {
    REFERENCE: lambda *parts: opacus("ghost", *parts),
    "DP-IRW ghost": lambda *parts: dp_irw("ghost", DEFAULT, *parts),
    "DP-IRW ghost, threshold only": lambda *parts: dp_irw("ghost", THRESHOLD_ONLY, *parts),
    "Opacus grad_sample": lambda *parts: opacus("hooks", *parts),
    "DP-IRW grad_sample": lambda *parts: dp_irw("hooks", DEFAULT, *parts),
    "not private": plain,
}


MATERIALISED = {"Opacus grad_sample", "DP-IRW grad_sample"}  # slow: a tenth of the rounds


def step_of(way: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x) // 2)
    model, optimizer, criterion = WAYS[way](build(), loader, nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    for name, (build, draw) in MODELS.items():
        x = draw()
        y = torch.randint(CLASSES, (len(x),))
        steps = {way: step_of(way, build, x, y) for way in WAYS}
        for way, step in steps.items():
            for _ in range(1 if way in MATERIALISED else 5):
                step()
        times = [
            {
                way: seconds(step)
                for way, step in steps.items()
                if way not in MATERIALISED or not i % 10
            }
            for i in range(rounds)
        ]
        parameters = sum(p.numel() for p in build().parameters())
        typical = 1e3 * statistics.median(t[REFERENCE] for t in times)
        print(f"\n{name}, {parameters:,} parameters; {REFERENCE} {typical:.1f} ms a step")
        for way in WAYS:
            ratios = [t[way] / t[REFERENCE] for t in times if way in t]
            low, median, high = statistics.quantiles(ratios, n=4)
            print(f"  {way:30} {median:5.2f}   quartiles {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
