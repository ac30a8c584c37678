"""Time of a private step: DP-IRW in ghost mode against Opacus' own ghost clipping.

All ways run in turn within one process, and what is reported is the ratio of a way's step to that
of Opacus' ghost clipping in the same round, its median and quartiles over the rounds: a ratio means
something on a busy machine, a time does not. A step is zero_grad, forward, backward and step.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import report
from benchmarks.cost.steps import time_ratios
from benchmarks.models import mlp
from benchmarks.training import step
from benchmarks.zoo.blocks import mean, widening
from irw_optim.privacy import IRWDPConfig, IRWPrivacyEngine

CLASSES = 10


class Block(nn.Module):
    """A transformer block that keeps the batch in dimension 0."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(width, heads, batch_first=True)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = widening(width)

    def forward(self, h: Tensor) -> Tensor:
        a = self.before(h)
        h = h + self.attention(a, a, a, need_weights=False)[0]
        return h + self.feed_forward(self.between(h))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for width, following in ((3, 32), (32, 64)):
        convolution = nn.Conv2d(width, following, 3, stride=2, padding=1)
        layers += [convolution, nn.GroupNorm(8, following), nn.ReLU()]
    last = nn.Conv2d(64, 64, 3, stride=2, padding=1)
    return nn.Sequential(*layers, last, nn.ReLU(), nn.Flatten(), nn.Linear(1024, CLASSES))


def transformer() -> nn.Module:
    blocks = Block(128, 4), Block(128, 4)
    return nn.Sequential(nn.Embedding(1000, 128), *blocks, mean(), nn.Linear(128, CLASSES))


def dense(width: int) -> Callable[[], nn.Module]:
    return lambda: mlp(100, width, width, CLASSES)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 100-256-256-10, B 256": (dense(256), (256, 100)),
    "MLP 100-1024-1024-10, B 64": (dense(1024), (64, 100)),
    "CNN with GroupNorm, 32 x 32, B 64": (cnn, (64, 3, 32, 32)),
    "transformer, 2 blocks of 128, T 64, B 32": (transformer, (32, 64)),
}
DEFAULT = {"irw": IRWDPConfig(init_threshold=math.log(CLASSES))}
THRESHOLD = {"irw": IRWDPConfig(init_threshold=math.log(CLASSES), direction_share=0.0, floor=0.3)}
WAYS: dict[str, tuple[str, Any, dict[str, Any]] | None] = {
    "Opacus ghost": ("ghost", PrivacyEngine, {}),  # the one to compare with
    "DP-IRW ghost": ("ghost", IRWPrivacyEngine, DEFAULT),
    "DP-IRW ghost, threshold only": ("ghost", IRWPrivacyEngine, THRESHOLD),
    "not private": None,
    "Opacus grad_sample": ("hooks", PrivacyEngine, {}),
    "DP-IRW grad_sample": ("hooks", IRWPrivacyEngine, DEFAULT),
}


def step_of(way: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    model, criterion = build(), nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    if WAYS[way] is not None:
        mode, engine, more = WAYS[way]
        model, optimizer, *returned = engine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x) // 2),
            criterion=criterion,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            **more,
        )
        if mode == "ghost" and engine is PrivacyEngine:
            criterion = returned[0]
    return partial(step, model, criterion, optimizer, x, y)


def main(given: list[str]) -> None:
    chosen = report.options(__doc__, given, rounds={"type": int, "default": 60})
    rounds = 2 if chosen.fast else chosen.rounds
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    for name, (build, shape) in MODELS.items():
        x = torch.randint(1000, shape) if build is transformer else torch.randn(shape)
        y = torch.randint(CLASSES, (len(x),))
        steps = {way: step_of(way, build, x, y) for way in WAYS}
        reference, *ways = steps
        parameters = sum(p.numel() for p in build().parameters())
        print(f"\n{name}, {parameters:,} parameters")
        for slow in (False, True):  # a tenth of the rounds for those that materialise
            those = [way for way in ways if ("grad_sample" in way) == slow]
            actions = [steps[way] for way in (reference, *those)]
            for action in actions * (0 if slow else 4):
                action()
            number = max(2, rounds // 10) if slow else rounds
            seconds, ratios = time_ratios(*actions, rounds=number, clock=time.perf_counter)
            print(f"  {reference} {1e3 * seconds:.1f} ms a step")
            for way, own in zip(those, ratios, strict=True):
                low, median, high = statistics.quantiles(own, n=4)
                print(f"  {way:30} {median:5.2f}   quartiles {low:.2f} to {high:.2f}")
