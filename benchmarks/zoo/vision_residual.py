"""Convolutional networks with skips: ResNets and their kin, DenseNet, U-Net, VGG."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.blocks import RELU, Joined, Make, SqueezeExcite, conv, head, normed
from benchmarks.zoo.entry import Batch, Entry, images, per_picture


class Residual(nn.Module):
    """Convolutions beside a skip, which is projected where the shape changes."""

    def __init__(
        self, body: list[nn.Module], inputs: int, outputs: int, stride: int, norm: Make
    ) -> None:
        super().__init__()
        self.body, self.skip = nn.Sequential(*body), nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip.extend(normed(inputs, outputs, 1, stride, norm=norm))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def basic(inputs: int, outputs: int, stride: int, norm: Make = nn.BatchNorm2d) -> Residual:
    """Two convolutions, as in ResNet-18."""
    body = normed(inputs, outputs, 3, stride, act=RELU, norm=norm)
    return Residual([*body, *normed(outputs, outputs, norm=norm)], inputs, outputs, stride, norm)


def bottleneck(inputs: int, outputs: int, stride: int, groups: int = 1, ratio: int = 4) -> Residual:
    """Narrow, convolve, widen, as in ResNet-50 and RegNet."""
    width = outputs // ratio
    body = normed(inputs, width, 1, act=RELU) + normed(width, width, 3, stride, groups, act=RELU)
    return Residual([*body, *normed(width, outputs, 1)], inputs, outputs, stride, nn.BatchNorm2d)


def resnet(
    block: Make, depths: list[int], widths: list[int], stem: int = 16, norm: Make = nn.BatchNorm2d
) -> nn.Sequential:
    """A stem, stages that halve the picture, a head."""
    layers, inputs = normed(3, stem, act=RELU, norm=norm), stem
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for index in range(depth):
            layers.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = width
    return nn.Sequential(*layers, head(inputs))


def group_norm_resnet() -> nn.Sequential:
    norm = partial(nn.GroupNorm, 4)
    return resnet(partial(basic, norm=norm), [2, 2, 2], [16, 32, 64], norm=norm)


def regnet() -> nn.Sequential:
    def block(inputs: int, outputs: int, stride: int) -> Residual:
        made = bottleneck(inputs, outputs, stride, groups=outputs // 8, ratio=1)
        made.body.insert(6, SqueezeExcite(outputs))
        return made

    return resnet(block, [1, 2, 3], [24, 56, 104])


def densenet(growth: int = 12, depths: tuple[int, ...] = (4, 6, 4)) -> nn.Sequential:
    """Every layer reads all maps before it."""
    width = 2 * growth
    layers: list[nn.Module] = [conv(3, width)]
    for stage, depth in enumerate(depths):
        if stage:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), conv(width, width // 2, 1)]
            layers += [nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            new = [nn.BatchNorm2d(width), nn.ReLU(), conv(width, 4 * growth, 1)]
            new += [nn.BatchNorm2d(4 * growth), nn.ReLU(), conv(4 * growth, growth)]
            layers.append(Joined([nn.Identity(), nn.Sequential(*new)]))
            width += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), head(width))


class UNet(nn.Module):
    """Down, up, and skips across; classes of pixels."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()

        def twice(inputs: int, outputs: int) -> nn.Sequential:
            first = normed(inputs, outputs, act=RELU)
            return nn.Sequential(*first, *normed(outputs, outputs, act=RELU))

        self.down = nn.ModuleList([twice(3, width), twice(width, 2 * width)])
        self.bottom = twice(2 * width, 4 * width)
        wider = (4 * width, 2 * width)
        self.lift = nn.ModuleList(nn.ConvTranspose2d(w, w // 2, 2, 2) for w in wider)
        self.up = nn.ModuleList(twice(w, w // 2) for w in wider)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for down in self.down:
            across.append(x := down(x))
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for lift, up in zip(self.lift, self.up, strict=True):
            x = up(torch.cat([across.pop(), lift(x)], 1))
        return self.classify(x)


def pixels(size: int) -> Batch:
    return (torch.randn(size, 3, 32, 32),), torch.randint(4, (size, 32, 32))


class StandardConv(nn.Conv2d):
    """A convolution whose filters are standardised, as in ResNetV2 and NFNet."""

    def __init__(self, *args: int, gain: bool = False, **options: int) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-6)
        if self.gain is not None:
            weight = weight * self.gain * self.weight[0].numel() ** -0.5
        return self._conv_forward(x, weight, self.bias)


class PreActivation(nn.Module):
    """ResNetV2's block: normalise and activate before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)])
        self.convs = nn.ModuleList(
            [StandardConv(inputs, outputs, 3, stride, 1), StandardConv(outputs, outputs, 3, 1, 1)]
        )
        self.skip = StandardConv(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](x))
        skip = x if self.skip is None else self.skip(hidden)
        hidden = F.relu(self.norms[1](self.convs[0](hidden)))
        return skip + self.convs[1](hidden)


def resnet_v2() -> nn.Sequential:
    return nn.Sequential(
        StandardConv(3, 16, 3, 1, 1),
        *[PreActivation(16, 16, 1), PreActivation(16, 32, 2), PreActivation(32, 32, 1)],
        *[PreActivation(32, 64, 2), PreActivation(64, 64, 1), nn.GroupNorm(4, 64), nn.ReLU()],
        head(64),
    )


class NormFree(nn.Module):
    """NFNet's block: scaled filters, a learned gain on the branch, no normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = StandardConv(inputs, outputs, 3, stride, 1, gain=True)
        self.second = StandardConv(outputs, outputs, 3, 1, 1, gain=True)
        self.excite = SqueezeExcite(outputs)
        self.skip = StandardConv(inputs, outputs, 1, stride, gain=True) if stride > 1 else None
        self.branch = nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x) * 1.7
        skip = x if self.skip is None else self.skip(hidden)
        hidden = self.second(F.gelu(self.first(hidden)) * 1.7)
        return skip + self.branch * 2 * self.excite(hidden)


def nfnet() -> nn.Sequential:
    return nn.Sequential(
        StandardConv(3, 16, 3, 1, 1, gain=True),
        *[NormFree(16, 16, 1), NormFree(16, 32, 2), NormFree(32, 64, 2), NormFree(64, 64, 1)],
        head(64),
    )


def vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for width, halve in [(16, False), (32, True), (64, False), (64, True), (128, True)]:
        layers += normed(inputs, width, act=RELU)
        layers += [nn.MaxPool2d(2)] if halve else []
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU(), nn.Dropout(),
                         nn.Linear(64, 10))  # fmt: skip


ENTRIES = [
    Entry("ResNet-18", "vision", 16,
          lambda: resnet(basic, [2, 2, 2, 2], [16, 32, 64, 128]), images(32)),
    Entry("ResNet-50", "vision", 16,
          lambda: resnet(bottleneck, [3, 4, 6, 3], [64, 128, 256, 512]), images(24)),
    Entry("WideResNet", "vision", 16,
          lambda: resnet(basic, [1, 1, 1], [32, 64, 128]), images(32)),
    Entry("ResNet, GroupNorm", "vision", 16, group_norm_resnet, images(32)),
    Entry("ResNetV2, standardised weights", "vision", 16, resnet_v2, images(32)),
    Entry("NFNet", "vision", 16, nfnet, images(32)),
    Entry("RegNet, squeeze-excite", "vision", 16, regnet, images(32)),
    Entry("DenseNet", "vision", 16, densenet, images(24)),
    Entry("U-Net", "vision", 16, UNet, pixels, per_picture),
    Entry("VGG, BatchNorm", "vision", 16, vgg, images(32)),
]  # fmt: skip
