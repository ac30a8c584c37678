"""Pictures cut into patches: ViT, BEiT, EVA, Swin, ConvNeXt, mixers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.blocks import Apply, Scale, Skip, head, mean, swapped, widening
from benchmarks.zoo.entry import Entry, images


class LayerNorm(nn.LayerNorm):
    """A subclass with a forward of its own, as libraries of vision models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(LayerNorm):
    """Normalises the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Fused queries, keys and values; with a table of biases by offset where asked."""

    def __init__(self, width: int, heads: int, window: int = 0, token: bool = False) -> None:
        super().__init__()
        self.heads, self.table = heads, None
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if window:
            offsets = (2 * window - 1) ** 2
            self.table = nn.Parameter(torch.randn(offsets + 3 * token, heads) * 0.02)
            self.register_buffer("index", _offsets(window, token))

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        qkv = self.qkv(x).reshape(size, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = None
        if self.table is not None:
            rows = self.table[self.index.flatten()].view(length, length, -1)
            bias = rows.permute(2, 0, 1).contiguous().unsqueeze(0)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(size, length, width))


def _offsets(window: int, token: bool) -> Tensor:
    """Which row of the table belongs to a pair of patches; the class token has three of its own."""
    line = torch.arange(window)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij")).flatten(1)
    dy, dx = (places[:, :, None] - places[:, None, :]) + window - 1
    index = dy * (2 * window - 1) + dx
    if not token:
        return index
    index = F.pad(index, (1, 0, 1, 0))
    first = (2 * window - 1) ** 2
    index[0, :], index[:, 0], index[0, 0] = first, first + 1, first + 2
    return index


def block(width: int, attention: nn.Module, mlp: nn.Module, scale: float = 0) -> nn.Sequential:
    """Attention and MLP with skips; with learned scales of the branches where asked."""
    scales = [[Scale(width, scale)] if scale else [] for _ in range(2)]
    branches = zip((attention, mlp), scales, strict=True)
    return nn.Sequential(*(Skip(LayerNorm(width, eps=1e-6), f, *by) for f, by in branches))


class ViT(nn.Module):
    """Patches, a class token (and a distilled one), positions, blocks, the token's class."""

    def __init__(self, blocks: list[nn.Module], width: int = 96, tokens: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.tokens = nn.Parameter(torch.randn(1, tokens, width) * 0.02) if tokens else None
        self.positions = nn.Parameter(torch.randn(1, 64 + tokens, width) * 0.02)
        self.blocks, self.norm = nn.Sequential(*blocks), LayerNorm(width)
        self.heads = nn.ModuleList([nn.Linear(width, 10) for _ in range(max(1, tokens))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.tokens is not None:
            x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.positions))
        x = x if self.tokens is not None else x.mean(1, keepdim=True)
        return sum(head(x[:, i]) for i, head in enumerate(self.heads)) / len(self.heads)


def vit(tokens: int = 1, scale: float = 0, **bias: Any) -> ViT:
    blocks = [block(96, Attention(96, 4, **bias), widening(96), scale) for _ in range(3)]
    return ViT(blocks, 96, tokens)


class RotaryAttention(nn.Module):
    """EVA's: queries and keys turned by their place, biases of their own for queries and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.norm, self.out = LayerNorm(width), nn.Linear(width, width)
        angles = torch.arange(64)[:, None] * 100 ** -torch.linspace(0, 1, width // heads // 2)
        self.register_buffer("cos", F.pad(angles.cos(), (0, 0, 1, 0), value=1.0))
        self.register_buffer("sin", F.pad(angles.sin(), (0, 0, 1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(size, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v)
        return self.out(self.norm(mixed.transpose(1, 2).reshape(size, length, width)))

    def _turn(self, x: Tensor) -> Tensor:
        even, odd = x.chunk(2, -1)
        return torch.cat([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], -1)


class SwiGLU(nn.Module):
    """A gated MLP with a normalisation inside."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm, self.out = LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(F.silu(self.gate(x)) * self.value(x)))


class Windows(nn.Module):
    """Swin's attention: inside windows, which are shifted in every second block."""

    def __init__(self, width: int, heads: int, window: int, side: int, shift: int) -> None:
        super().__init__()
        self.window, self.side, self.shift = window, side, shift
        self.attention = Attention(width, heads, window)

    def forward(self, x: Tensor) -> Tensor:
        size, _, width = x.shape
        count, window = self.side // self.window, self.window
        x = x.view(size, self.side, self.side, width)
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.view(size, count, window, count, window, width).transpose(2, 3)
        x = self.attention(x.reshape(-1, window * window, width))
        x = x.view(size, count, count, window, window, width).transpose(2, 3)
        x = x.reshape(size, self.side, self.side, width)
        x = torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x.view(size, -1, width)


class Merge(nn.Module):
    """Four patches become one of twice the width."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side, self.norm = side, LayerNorm(4 * width)
        self.narrow = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), self.side, self.side, -1)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.narrow(self.norm(torch.cat(parts, -1))).flatten(1, 2)


def swin(width: int = 48) -> nn.Sequential:
    def stage(width: int, heads: int, side: int) -> list[nn.Module]:
        return [block(width, Windows(width, heads, 4, side, s), widening(width)) for s in (0, 2)]

    return nn.Sequential(
        nn.Conv2d(3, width, 2, 2), nn.Flatten(2), swapped(), LayerNorm(width),
        *stage(width, 3, 16), Merge(width, 16), *stage(2 * width, 6, 8),
        LayerNorm(2 * width), mean(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def convnext(width: int = 40) -> nn.Sequential:
    def part(width: int) -> Skip:
        return Skip(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Apply(lambda x: x.permute(0, 2, 3, 1)), LayerNorm(width), widening(width),
            Scale(width, 0.1), Apply(lambda x: x.permute(0, 3, 1, 2)),
        )  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4), LayerNorm2d(width), part(width), part(width),
        LayerNorm2d(width), nn.Conv2d(width, 2 * width, 2, 2), part(2 * width), part(2 * width),
        head(2 * width),
    )  # fmt: skip


def mixer() -> ViT:
    def layers() -> list[nn.Module]:
        across = Skip(LayerNorm(96), swapped(), widening(64, 1), swapped())
        return [across, Skip(LayerNorm(96), widening(96))]

    return ViT([layer for _ in range(4) for layer in layers()], tokens=0)


class PoolBlock(nn.Module):
    """PoolFormer: a mean over the neighbours in place of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.widen, self.narrow = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.scales = nn.Parameter(torch.full((2, width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(x)
        x = x + self.scales[0] * (F.avg_pool2d(hidden, 3, 1, 1) - hidden)
        return x + self.scales[1] * self.narrow(F.gelu(self.widen(self.norm2(x))))


ENTRIES = [
    Entry("ViT, class token", "vision", 16, vit, images(32)),
    Entry("DeiT, two tokens", "vision", 16, lambda: vit(tokens=2), images(32)),
    Entry("BEiT, bias tables", "vision", 16,
          lambda: vit(scale=0.1, window=8, token=True), images(32)),
    Entry("EVA, rotary, SwiGLU", "vision", 16,
          lambda: ViT([block(96, RotaryAttention(96, 4), SwiGLU(96, 256)) for _ in range(3)]),
          images(32)),
    Entry("Swin, bias tables", "vision", 16, swin, images(32)),
    Entry("ConvNeXt", "vision", 16, convnext, images(32)),
    Entry("MLP-Mixer", "vision", 16, mixer, images(32)),
    Entry("PoolFormer", "vision", 16,
          lambda: nn.Sequential(
              nn.Conv2d(3, 64, 4, 4), *(PoolBlock(64) for _ in range(4)), head(64)), images(32)),
]  # fmt: skip
