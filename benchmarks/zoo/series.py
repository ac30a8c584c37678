"""Sounds and series, by convolutions in time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from benchmarks.models import mlp
from benchmarks.zoo.blocks import Apply, head
from benchmarks.zoo.entry import Batch, Entry, squared, waves


class Causal(nn.Module):
    """TCN's block: dilated causal convolutions with normalised weights, and a skip."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.first = weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for layer in (self.first, self.second):
            hidden = self.drop(F.relu(layer(F.pad(hidden, (self.pad, 0)))))
        return F.relu(hidden + self.skip(x))


def tcn() -> nn.Sequential:
    blocks = [Causal(1, 24, 1), Causal(24, 24, 2), Causal(24, 24, 4), Causal(24, 24, 8)]
    return nn.Sequential(*blocks, Apply(lambda x: x[..., -1]), nn.Linear(24, 10))


def pooled_head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10)]


def audio_net() -> nn.Sequential:
    """M5: raw sound, convolutions with BatchNorm and pooling."""
    layers: list[nn.Module] = [nn.Conv1d(1, 32, 40, stride=8), nn.BatchNorm1d(32), nn.ReLU()]
    for inputs, outputs in [(32, 32), (32, 64), (64, 64)]:
        layers += [nn.MaxPool1d(2), nn.Conv1d(inputs, outputs, 3), nn.BatchNorm1d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, *pooled_head(64))


class Gated(nn.Module):
    """WaveNet's block: a tanh gated by a sigmoid; what it adds, and what it shows."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = dilation
        self.both = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.add, self.show = nn.Conv1d(width, width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = self.both(F.pad(x, (self.pad, 0))).chunk(2, 1)
        hidden = value.tanh() * gate.sigmoid()
        return x + self.add(hidden), self.show(hidden)


class WaveNet(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.blocks = nn.ModuleList([Gated(width, 2**i) for i in range(5)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, shown = self.stem(x), 0
        for block in self.blocks:
            x, part = block(x)
            shown = shown + part
        return self.head(F.relu(shown).mean(2))


class Inception(nn.Module):
    """InceptionTime's block: kernels of several lengths side by side, BatchNorm over all."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv1d(inputs, width, 1, bias=False)
        self.convs = nn.ModuleList(
            [nn.Conv1d(width, width, kernel, padding="same", bias=False) for kernel in (5, 11, 21)]
        )
        self.pooled = nn.Conv1d(inputs, width, 1, bias=False)
        self.norm = nn.BatchNorm1d(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.narrow(x)
        maps = [layer(narrow) for layer in self.convs]
        maps.append(self.pooled(F.max_pool1d(x, 3, 1, 1)))
        return F.relu(self.norm(torch.cat(maps, 1)))


def inception_time() -> nn.Sequential:
    return nn.Sequential(Inception(1, 12), Inception(48, 12), *pooled_head(48))


class SpectralNet(nn.Module):
    """A spectrogram, normalised by learned gains of its bands, then convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.gain, self.shift = nn.Parameter(torch.ones(33, 1)), nn.Parameter(torch.zeros(33, 1))
        convs = nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        self.body = nn.Sequential(*convs, head(32))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x.squeeze(1), 64, 16, window=self.window, return_complex=True)
        return self.body((spectrum.abs().log1p() * self.gain + self.shift).unsqueeze(1))


class Forecaster(nn.Module):
    """N-BEATS: blocks explain the past, what is left goes on, forecasts add up."""

    def __init__(self, past: int = 96, future: int = 24, width: int = 128) -> None:
        super().__init__()
        self.past = past
        self.blocks = nn.ModuleList(mlp(past, width, width, past + future) for _ in range(3))

    def forward(self, series: Tensor) -> Tensor:
        total = 0
        for block in self.blocks:
            output = block(series)
            series, total = series - output[:, : self.past], total + output[:, self.past :]
        return total


def futures(size: int) -> Batch:
    series = torch.randn(size, 120).cumsum(1)
    return (series[:, :96].contiguous(),), series[:, 96:].contiguous()


FAMILY = "audio and series"
ENTRIES = [
    Entry("TCN, weight norm", FAMILY, 16, tcn, waves(256)),
    Entry("Conv audio net, BatchNorm", FAMILY, 32, audio_net, waves(2000)),
    Entry("WaveNet", FAMILY, 16, WaveNet, waves(256)),
    Entry("InceptionTime", FAMILY, 32, inception_time, waves(128)),
    Entry("Spectrogram net", FAMILY, 32, SpectralNet, waves(1000)),
    Entry("N-BEATS", FAMILY, 64, Forecaster, futures, squared),
]
