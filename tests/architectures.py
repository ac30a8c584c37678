"""Real architectures at small sizes: each a model, a batch and its targets. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from models import Recurrent
from torch import Tensor, nn


class Architecture(NamedTuple):
    """How to build it, what it reads, and what it is compared with."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]


class Logits(nn.Module):
    """The logits of a Hugging Face model, which returns a ModelOutput."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits


class Residual(nn.Module):
    """A basic block of a ResNet: two convolutions with BatchNorm and a shortcut."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        wider = channels * stride
        self.first = nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(wider)
        self.second = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.shortcut = (
            nn.Conv2d(channels, wider, 1, stride=stride) if stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.first(x)))
        hidden = self.norm2(self.second(hidden))
        hidden += self.shortcut(x)
        return torch.relu_(hidden)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Residual(4),
        Residual(4, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class UNet(nn.Module):
    """Down, up and across; a loss per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = self.enter(x)
        return self.leave(torch.cat([across, self.up(self.down(across))], 1))


def recurrent(kind: type[nn.RNNBase]) -> nn.Module:
    return nn.Sequential(nn.Embedding(12, 6), Recurrent(kind(6, 5, batch_first=True), 3))


class TabularTransformer(nn.Module):
    """Each feature a token (FT-Transformer): parameters directly on a module, and a class token."""

    def __init__(self, features: int = 5, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, width))
        self.bias = nn.Parameter(torch.randn(features, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1) * self.weight + self.bias
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.encoder(tokens)[:, 0])


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    return Logits(transformers.BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    return Logits(transformers.GPT2ForSequenceClassification(config))


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return Logits(transformers.ViTForImageClassification(config))


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8)


def tokens() -> Tensor:
    return torch.randint(1, 12, (5, 6))


def classes() -> Tensor:
    return torch.randint(0, 3, (5,))


def pixels() -> Tensor:
    return torch.randint(0, 3, (5, 8, 8))


ARCHITECTURES: dict[str, Any] = {
    "ResNet with BatchNorm": Architecture(resnet, images, classes),
    "U-Net, loss per pixel": Architecture(UNet, images, pixels),
    "LSTM": Architecture(lambda: recurrent(nn.LSTM), tokens, classes),
    "GRU": Architecture(lambda: recurrent(nn.GRU), tokens, classes),
    "tabular transformer": Architecture(TabularTransformer, lambda: torch.randn(5, 5), classes),
    "BERT": Architecture(bert, tokens, classes),
    "GPT-2": Architecture(gpt2, tokens, classes),
    "ViT": Architecture(vit, images, classes),
}
