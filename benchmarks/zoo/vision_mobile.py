"""Convolutional networks for telephones: depthwise convolutions, gates, cheap activations."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.blocks import RELU, Joined, Make, Skip, SqueezeExcite, head, normed
from benchmarks.zoo.entry import Entry, images

HardExcite = partial(SqueezeExcite, least=8, gate=F.hardsigmoid)
"""MobileNetV3's gates."""


def inverted_block(
    inputs: int, outputs: int, stride: int, act: Make, excite: Make | None, kernel: int
) -> nn.Sequential:
    """Widen, convolve by channel, gate, narrow; a skip where shapes agree."""
    width = 4 * inputs
    layers = normed(inputs, width, 1, act=act) + normed(width, width, kernel, stride, width, act)
    layers += [excite(width)] if excite else []
    layers += normed(width, outputs, 1)
    return (Skip if stride == 1 and inputs == outputs else nn.Sequential)(*layers)


def _stages(stem: nn.Module, blocks: list[nn.Module], width: int, act: Make) -> nn.Sequential:
    last = normed(width, 4 * width, 1, act=act)
    return nn.Sequential(*normed(3, 16), stem, *blocks, *last, head(4 * width))


def inverted(
    width: int, acts: Sequence[Make], gates: Sequence[Make | None], kernels: Sequence[int]
) -> nn.Sequential:
    """MobileNets and EfficientNet: five blocks, each with its activation, gate and kernel."""
    shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, width, 2), (width, width, 1)]
    each = zip(shapes, acts, gates, kernels, strict=True)
    return _stages(acts[-1](), [inverted_block(*s, *how) for s, *how in each], width, acts[-1])


class Ghost(nn.Module):
    """Half of the maps by a convolution, the others by cheap ones of these."""

    def __init__(self, inputs: int, outputs: int, act: Make = RELU) -> None:
        super().__init__()
        half = outputs // 2
        self.first = nn.Sequential(*normed(inputs, half, 1, act=act))
        self.cheap = nn.Sequential(*normed(half, half, 3, 1, half, act))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return torch.cat([first, self.cheap(first)], 1)


class GhostBottleneck(nn.Module):
    """Widen and narrow by ghost maps, gated by the hard sigmoid."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = 2 * inputs
        self.widen, self.narrow = Ghost(inputs, width), Ghost(width, outputs, nn.Identity)
        self.excite = HardExcite(width)
        self.move = nn.Sequential(*normed(width, width, 3, stride, width))
        skip = normed(inputs, inputs, 3, stride, inputs) + normed(inputs, outputs, 1)
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.excite(self.move(self.widen(x)))) + self.skip(x)


def ghostnet() -> nn.Sequential:
    shapes = [(16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1)]
    return _stages(RELU(), [GhostBottleneck(*shape) for shape in shapes], 40, nn.ReLU)


class Shuffle(nn.Sequential):
    """ShuffleNetV2: half of the channels pass, the other half is convolved, all are shuffled."""

    def __init__(self, width: int) -> None:
        half = width // 2
        layers = normed(half, half, 1, act=RELU) + normed(half, half, 3, 1, half)
        super().__init__(*layers, *normed(half, half, 1, act=RELU))

    def forward(self, x: Tensor) -> Tensor:
        passed, moved = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([passed, super().forward(moved)], 1), 2)


def shufflenet() -> nn.Sequential:
    narrower = partial(normed, stride=2, act=RELU)
    blocks = [Shuffle(16), *narrower(16, 48), Shuffle(48), Shuffle(48), *narrower(48, 96)]
    return _stages(nn.ReLU(), [*blocks, Shuffle(96), Shuffle(96)], 96, nn.ReLU)


def fire(inputs: int, narrow: int, outputs: int) -> nn.Sequential:
    """SqueezeNet: narrow, then two kernels side by side."""
    first, half = nn.Conv2d(inputs, narrow, 1), outputs // 2
    both = Joined([nn.Conv2d(narrow, half, 1), nn.Conv2d(narrow, half, 3, padding=1)])
    return nn.Sequential(first, nn.ReLU(), both, nn.ReLU())


def squeezenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        fire(32, 8, 64), fire(64, 8, 64), nn.MaxPool2d(2), fire(64, 16, 128), fire(128, 16, 128),
        nn.Dropout(), nn.Conv2d(128, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


MIXED = (3, 3, 5, 3, 3)
ENTRIES = [
    Entry("MobileNetV2", "vision", 16,
          lambda: inverted(32, [nn.ReLU6] * 5, [None] * 5, [3] * 5), images(24)),
    Entry("MobileNetV3, hard-swish", "vision", 16,
          lambda: inverted(40, [nn.ReLU] * 2 + [nn.Hardswish] * 3, [None] + [HardExcite] * 4,
                           MIXED), images(24)),
    Entry("EfficientNet, squeeze-excite", "vision", 16,
          lambda: inverted(40, [nn.SiLU] * 5, [SqueezeExcite] * 5, MIXED), images(24)),
    Entry("GhostNet", "vision", 16, ghostnet, images(32)),
    Entry("ShuffleNetV2", "vision", 16, shufflenet, images(32)),
    Entry("SqueezeNet", "vision", 16, squeezenet, images(32)),
]  # fmt: skip
