"""Convolutional networks for telephones: depthwise convolutions, gates, cheap activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.entry import Entry, images
from benchmarks.zoo.vision_residual import SqueezeExcite, conv, head


class HardExcite(nn.Module):
    """MobileNetV3's gates, with the hard sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(width, max(8, width // 4), 1)
        self.widen = nn.Conv2d(max(8, width // 4), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.widen(F.relu(self.narrow(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gates)


class Inverted(nn.Module):
    """Widen, convolve by channel, gate, narrow; a skip where shapes agree."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        act: type[nn.Module],
        excite: type[nn.Module] | None = None,
        expand: int = 4,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        width = inputs * expand
        layers = [conv(inputs, width, 1), nn.BatchNorm2d(width), act()]
        layers += [conv(width, width, kernel, stride, width), nn.BatchNorm2d(width), act()]
        layers += [excite(width)] if excite else []
        self.body = nn.Sequential(*layers, conv(width, outputs, 1), nn.BatchNorm2d(outputs))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


def _stages(stem: nn.Module, blocks: list[nn.Module], width: int, act: nn.Module) -> nn.Sequential:
    last = [conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width), act]
    return nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), stem, *blocks, *last, head(4 * width))


def inverted(
    width: int,
    acts: list[type[nn.Module]],
    gates: list[type[nn.Module] | None],
    kernels: tuple[int, ...] = (3, 3, 5, 3, 3),
) -> nn.Sequential:
    """MobileNets and EfficientNet: five blocks, each with its activation, gate and kernel."""
    shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, width, 2), (width, width, 1)]
    each = zip(shapes, acts, gates, kernels, strict=True)
    blocks = [Inverted(*shape, act, gate, kernel=k) for shape, act, gate, k in each]
    return _stages(acts[-1](), blocks, width, acts[-1]())


class Ghost(nn.Module):
    """Half of the maps by a convolution, the others by cheap ones of these."""

    def __init__(self, inputs: int, outputs: int, act: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.first = nn.Sequential(conv(inputs, half, 1), nn.BatchNorm2d(half))
        self.cheap = nn.Sequential(conv(half, half, 3, 1, half), nn.BatchNorm2d(half))
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.first(x))
        return torch.cat([first, self.act(self.cheap(first))], 1)


class GhostBottleneck(nn.Module):
    """Widen and narrow by ghost maps, gated by the hard sigmoid."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = 2 * inputs
        self.widen, self.narrow = Ghost(inputs, width), Ghost(width, outputs, act=False)
        self.excite = HardExcite(width)
        self.move = nn.Sequential(conv(width, width, 3, stride, width), nn.BatchNorm2d(width))
        self.skip = nn.Sequential(
            conv(inputs, inputs, 3, stride, inputs), nn.BatchNorm2d(inputs),
            conv(inputs, outputs, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.excite(self.move(self.widen(x)))) + self.skip(x)


def ghostnet() -> nn.Sequential:
    blocks: list[nn.Module] = [GhostBottleneck(16, 24, 2), GhostBottleneck(24, 24, 1)]
    blocks += [GhostBottleneck(24, 40, 2), GhostBottleneck(40, 40, 1)]
    return _stages(nn.ReLU(inplace=True), blocks, 40, nn.ReLU())


class Shuffle(nn.Module):
    """ShuffleNetV2: half of the channels pass, the other half is convolved, all are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
            conv(half, half, 3, 1, half), nn.BatchNorm2d(half),
            conv(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        passed, moved = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([passed, self.body(moved)], 1), 2)


def shufflenet() -> nn.Sequential:
    def narrower(inputs: int, outputs: int) -> list[nn.Module]:
        return [conv(inputs, outputs, 3, 2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    blocks = [Shuffle(16), *narrower(16, 48), Shuffle(48), Shuffle(48), *narrower(48, 96)]
    return _stages(nn.ReLU(), [*blocks, Shuffle(96), Shuffle(96)], 96, nn.ReLU())


class Fire(nn.Module):
    """SqueezeNet: narrow, then two kernels side by side."""

    def __init__(self, inputs: int, narrow: int, outputs: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(inputs, narrow, 1)
        self.small = nn.Conv2d(narrow, outputs // 2, 1)
        self.large = nn.Conv2d(narrow, outputs // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.narrow(x))
        return F.relu(torch.cat([self.small(x), self.large(x)], 1))


def squeezenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        Fire(32, 8, 64), Fire(64, 8, 64), nn.MaxPool2d(2), Fire(64, 16, 128), Fire(128, 16, 128),
        nn.Dropout(), nn.Conv2d(128, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


ENTRIES = [
    Entry("MobileNetV2", "vision", 16,
          lambda: inverted(32, [nn.ReLU6] * 5, [None] * 5, (3,) * 5), images(24)),
    Entry("MobileNetV3, hard-swish", "vision", 16,
          lambda: inverted(40, [nn.ReLU] * 2 + [nn.Hardswish] * 3, [None] + [HardExcite] * 4),
          images(24)),
    Entry("EfficientNet, squeeze-excite", "vision", 16,
          lambda: inverted(40, [nn.SiLU] * 5, [SqueezeExcite] * 5), images(24)),
    Entry("GhostNet", "vision", 16, ghostnet, images(32)),
    Entry("ShuffleNetV2", "vision", 16, shufflenet, images(32)),
    Entry("SqueezeNet", "vision", 16, squeezenet, images(32)),
]  # fmt: skip
