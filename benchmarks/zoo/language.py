"""Texts: GPTs with layers of their own, recurrent networks, bags of words."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.zoo.blocks import Apply, Joined, Skip, mean, swapped, widening
from benchmarks.zoo.entry import WORDS, Batch, Entry, pairs, per_sequence, sentences, texts


class LayerNorm(nn.Module):
    """A normalisation of its own, as nanoGPT has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        q, k, v = (
            part.view(size, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, 2)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed = self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return F.dropout(mixed, self.dropout, self.training)


class GPT(nn.Module):
    """Tokens and places, causal blocks, a head that is the table of the tokens."""

    def __init__(self, dropout: float, width: int = 96, depth: int = 3, length: int = 48) -> None:
        super().__init__()

        def block() -> list[nn.Module]:
            attention = Skip(LayerNorm(width), CausalAttention(width, 4, dropout))
            return [attention, Skip(LayerNorm(width), widening(width), nn.Dropout(dropout))]

        self.tokens, self.places = nn.Embedding(WORDS, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(part for _ in range(depth) for part in block()))
        self.norm, self.head = LayerNorm(width), nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(self.drop(self.tokens(tokens) + places))))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class RelativeAttention(nn.Module):
    """T5's: no scale, and a bias by the distance, learned in buckets."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.distances = nn.Embedding(16, heads)
        line = torch.arange(length)
        self.register_buffer("buckets", (line[None] - line[:, None]).clamp(-8, 7) + 8)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        q, k, v = (
            layer(x).view(size, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        affinity = q @ k.transpose(2, 3) + self.distances(self.buckets).permute(2, 0, 1)
        return self.out((affinity.softmax(-1) @ v).transpose(1, 2).reshape(size, length, width))


def relative(width: int = 96, length: int = 32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers.append(Skip(RMSNorm(width), RelativeAttention(width, 4, length)))
        widen = nn.Linear(width, 4 * width, bias=False)
        narrow = nn.Linear(4 * width, width, bias=False)
        layers.append(Skip(RMSNorm(width), widen, nn.ReLU(), narrow))
    tokens, norm = nn.Embedding(WORDS, width), RMSNorm(width)
    return nn.Sequential(tokens, *layers, norm, mean(), nn.Linear(width, 2))


class Recurrent(nn.Module):
    """Embeds tokens, runs a recurrent layer, classifies its last state."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, 64)
        self.layer = kind(64, 64, batch_first=True, **options)
        self.head = nn.Linear(64 * (1 + self.layer.bidirectional), 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(tokens))[0][:, -1])


class Packed(Recurrent):
    """The same for sequences of unequal lengths, packed; a mean over each one's own steps."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.tokens(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        output, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(output.sum(1) / lengths[:, None])


def uneven(length: int) -> Callable[[int], Batch]:
    def draw(size: int) -> Batch:
        (tokens,), classes = sentences(length)(size)
        return (tokens, torch.randint(length // 4, length + 1, (size,))), classes

    return draw


class TiedLSTM(nn.Module):
    """A language model whose head is the table of the tokens."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tokens, self.drop = nn.Embedding(WORDS, width), nn.Dropout(0.2)
        self.layer = nn.LSTM(width, width, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(width, WORDS)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(self.layer(self.drop(self.tokens(tokens)))[0]))


class AttentiveLSTM(nn.Module):
    """A learned query looks at all states of a bidirectional layer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, width)
        self.layer = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.query = nn.Parameter(torch.randn(2 * width) * 0.1)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.layer(self.tokens(tokens))
        attention = (states.tanh() @ self.query).softmax(1)
        return self.head((attention[:, None] @ states).squeeze(1))


def text_cnn() -> nn.Sequential:
    tokens, largest = nn.Embedding(WORDS, 64), Apply(lambda x: x.amax(2))
    kernels = [nn.Sequential(nn.Conv1d(64, 64, k), nn.ReLU(), largest) for k in (3, 4, 5)]
    return nn.Sequential(tokens, swapped(), Joined(kernels), nn.Dropout(0.5), nn.Linear(3 * 64, 2))


class Translator(nn.Module):
    """Encoder and decoder of torch, with causal and cross-attention."""

    def __init__(self, width: int = 64, length: int = 20) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, width), nn.Embedding(length, width)
        self.body = nn.Transformer(width, 4, 1, 1, 4 * width, batch_first=True)
        self.head = nn.Linear(width, WORDS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        places = self.places.weight
        source, target = self.tokens(source) + places, self.tokens(target) + places
        return self.head(self.body(source, target, tgt_mask=self.mask, tgt_is_causal=True))


ENTRIES = [
    Entry("nanoGPT", "language", 16, lambda: GPT(0.0), texts(48), per_sequence),
    Entry("nanoGPT, dropout", "language", 16, lambda: GPT(0.1), texts(48), per_sequence),
    Entry("Relative positions, own RMSNorm", "language", 16, relative, sentences(32)),
    Entry("Encoder-decoder of torch", "language", 16, Translator, pairs(20, 20), per_sequence),
    Entry("RNN", "language", 32, lambda: Recurrent(nn.RNN), sentences(32)),
    Entry("LSTM", "language", 32, lambda: Recurrent(nn.LSTM), sentences(32)),
    Entry("GRU", "language", 32, lambda: Recurrent(nn.GRU), sentences(32)),
    Entry("LSTM, two layers, both ways", "language", 16,
          lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), sentences(24)),
    Entry("LSTM, packed", "language", 16, lambda: Packed(nn.LSTM), uneven(32)),
    Entry("GRU, packed, both ways", "language", 16,
          lambda: Packed(nn.GRU, bidirectional=True), uneven(32)),
    Entry("LSTM language model, tied", "language", 16, TiedLSTM, texts(24), per_sequence),
    Entry("LSTM, attention", "language", 32, AttentiveLSTM, sentences(24)),
    Entry("TextCNN", "language", 32, text_cnn, sentences(48)),
    Entry("Bag of words", "language", 32,
          lambda: nn.Sequential(nn.EmbeddingBag(WORDS, 32), nn.Linear(32, 2)), sentences(32)),
]  # fmt: skip
