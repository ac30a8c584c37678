"""Models that per-sample gradients get wrong: each a few lines around one difficulty.

A batch has `B` samples and sequences `T` steps; `SQUARE` sequences are as long as the batch, so
that the batch cannot be told from the sequence by its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from models import OnceDifferentiable
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

B, T, D = 6, 4, 4
SQUARE = B


class Case(NamedTuple):
    """A model, a maker of its inputs, and how it is called: returns outputs (B, ...)."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    call: Callable[..., Tensor] = lambda model, *inputs: model(*inputs)


def normal(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(B, *shape),)


def tokens(length: int = T) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(7, (B, length)),)


def built(forward: Callable[..., Any], **children: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A maker of modules with these children and ``forward(self, *inputs)``."""

    def make() -> nn.Module:
        model = type("Built", (nn.Module,), {"forward": forward})()
        for name, child in children.items():
            setattr(model, name, child())
        return model

    return make


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def linear(width_in: int = D, width_out: int = D) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(width_in, width_out)


def mlp(*between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(D, D), *(make() for make in between), nn.Linear(D, 3))


def frozen(make: Callable[[], nn.Module], *names: str) -> Callable[[], nn.Module]:
    """The parameters whose names contain one of these do not train."""

    def build() -> nn.Module:
        model = make()
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in names))
        return model

    return build


# In place ---------------------------------------------------------------------------------------


def residual_in_place(self, x):
    h = self.first(x)
    h += self.skip(x)
    h.relu_()
    h = self.second(h)
    h[:, 0] *= 2
    return h


def sequence_changed_in_place(self, x):
    h = self.first(x)  # (B, T, D): the output is a view of the matrix product
    h += 1
    return self.second(h.transpose(0, 1)).transpose_(0, 1)


# How tensors come and go ------------------------------------------------------------------------


def by_keyword(self, *, x, scale):
    return self.second(input=self.first(input=x) * scale)


def dictionary(self, batch):
    h = self.first(batch["x"])
    return {"out": self.second(h), "hidden": (h,)}


def two_inputs(self, x, y):
    return self.first(x) * self.second(y)


# The same parameters, several times -------------------------------------------------------------


def reused(self, x):
    return self.first(self.first(x).tanh()).tanh() + self.first(x[:, :1] * x)


def reused_on_other_lengths(self, x):
    return self.first(x).mean(1) + self.first(x[:, :2]).sum(1)


class Tied(nn.Module):
    """Embedding and output layer share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, D)
        self.out = nn.Linear(D, 7)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x).tanh())


def functional_weight(self, x):
    return F.linear(self.child(x).tanh(), self.child.weight) + self.child.bias


def functional_weight_alone(self, x):
    return F.linear(x, self.child.weight)


def direct_parameters(self, x):
    return (x * self.scale + self.shift) @ self.matrix + torch.einsum("bi,ij->bj", x, self.other)


def scalar_parameter(self, x):
    return self.first(x) * self.temperature.exp()


# Position embeddings ----------------------------------------------------------------------------


def positions_broadcast(self, x):
    return self.second(self.first(x) + self.position(torch.arange(x.shape[1])))


def positions_broadcast_by_one(self, x):
    return self.second(self.first(x) + self.position(torch.arange(x.shape[1])[None]))


def positions_expanded(self, x):
    return self.second(
        self.first(x) + self.position(torch.arange(x.shape[1])[None].expand(len(x), -1))
    )


def positions_as_parameter(self, x):
    h = torch.cat([self.token.expand(len(x), -1, -1), self.first(x)], 1)
    return self.second(h + self.position[:, : h.shape[1]])


# Where the batch is -----------------------------------------------------------------------------


def folded(self, x):  # (B, T, D) -> (B T, D) and back
    h = self.first(x.flatten(0, 1)).relu()
    return self.second(h.unflatten(0, x.shape[:2]).mean(1))


def folded_frames(self, x):  # (B, T, C, H, W)
    return self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def time_first(self, x):
    return self.second(self.first(x.transpose(0, 1)).tanh()).transpose(0, 1)


def features_first(self, x):  # a linear map over the features of (D, B)
    return (self.first.weight @ x.T).T


def sorted_and_back(self, x, order):
    h = self.first(x[order])
    return self.second(h[order.argsort()])


def routed(self, x):  # every sample goes through one of two experts
    left = x[:, 0] > 0
    out = torch.empty_like(x)
    out[left], out[~left] = self.first(x[left]), self.second(x[~left])
    return out


# Samples that see each other --------------------------------------------------------------------


def centred(self, x):
    h = self.first(x)
    return self.second(h - h.mean(0))


def attention_over_the_batch(self, x):
    h = self.first(x)
    return self.second((h @ h.T).softmax(1) @ h)


def in_batch_negatives(self, x, y):
    return self.first(x) @ self.second(y).T


# Recurrence -------------------------------------------------------------------------------------


def recurrent(self, x):
    out, _ = self.cell(x)
    return self.head(out)


def recurrent_time_first(self, x):
    out, _ = self.cell(x.transpose(0, 1))
    return self.head(out[-1])


def packed(self, x, lengths):
    sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(self.cell(sequence)[0], batch_first=True)
    return self.head(out)


def unrolled(self, x):
    h = x.new_zeros(len(x), D)
    for step in x.unbind(1):
        h = self.cell(step, h)
    return self.head(h)


# Attention --------------------------------------------------------------------------------------


def self_attention(self, x):
    return self.head(self.attention(x, x, x)[0])


def self_attention_time_first(self, x):
    h = x.transpose(0, 1)
    return self.head(self.attention(h, h, h, need_weights=False)[0].transpose(0, 1))


def fused_attention(self, x):
    q, k, v = self.qkv(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.head(h.transpose(1, 2).flatten(2))


def encoder_layer(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(D, 2, 8, **{"dropout": 0.0, **options})


def encoder(self, x):
    return self.head(self.layer(x))


def decoder(self, x, y):
    return self.head(self.layer(x, y))


# Wrapped parameters and passes ------------------------------------------------------------------


def checkpointed(self, x, reentrant=False):
    h = checkpoint(lambda t: self.second(t).tanh(), self.first(x), use_reentrant=reentrant)
    return self.third(h)


def compiled(backend: str) -> Callable[[], nn.Module]:
    return lambda: torch.compile(mlp(nn.ReLU)(), backend=backend)


class LoRA(nn.Module):
    """A frozen layer beside a trainable low-rank one."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


def through_a_custom_function(self, x):
    return self.norm(OnceDifferentiable.apply(self.first(x)))


def functional_call(self, x):
    parameters = {name: p * 2 for name, p in self.child.named_parameters()}
    return torch.func.functional_call(self.child, parameters, (x,))


def batch_norms(self, x):
    return self.head(self.norm(self.conv(x)).relu().flatten(1))


def unet(self, x):
    down = self.down(x).relu()
    middle = self.norm(self.middle(F.max_pool2d(down, 2)).relu())
    up = F.interpolate(middle, scale_factor=2, mode="bilinear")
    return self.out(torch.cat([down, up], 1))


def unused_branch(self, x):
    self.second(x)  # computed and thrown away
    return self.first(x)


def lengths() -> tuple[Tensor, Tensor]:
    return torch.randn(B, T, D), torch.tensor([2, 4, 1, 3, 4, 2])


CASES: dict[str, Case] = {
    # in place
    "in-place ReLU": Case(mlp(lambda: nn.ReLU(inplace=True)), normal(D)),
    "in-place dropout": Case(mlp(lambda: nn.Dropout(0.5, inplace=True)), normal(D)),
    "in-place residual": Case(
        built(residual_in_place, first=linear(), skip=linear(), second=linear()), normal(D)
    ),
    "sequence changed in place": Case(
        built(sequence_changed_in_place, first=linear(), second=linear()), normal(T, D)
    ),
    # how tensors come and go
    "tensors by keyword": Case(
        built(by_keyword, first=linear(), second=linear()),
        normal(D),
        lambda model, x: model(x=x, scale=2.0),
    ),
    "dictionaries": Case(
        built(dictionary, first=linear(), second=linear()),
        lambda: ({"x": torch.randn(B, D)},),
        lambda model, batch: model(batch)["out"],
    ),
    "two inputs": Case(
        built(two_inputs, first=linear(), second=linear()),
        lambda: (torch.randn(B, D), torch.randn(B, D)),
    ),
    "one number a sample": Case(
        built(lambda self, x: self.first(x)[:, 0], first=linear()), normal(D)
    ),
    # the same parameters, several times
    "reused layer": Case(built(reused, first=linear()), normal(D)),
    "reused on other lengths": Case(built(reused_on_other_lengths, first=linear()), normal(T, D)),
    "tied weights": Case(Tied, tokens()),
    "tied weights, square": Case(Tied, tokens(SQUARE)),
    "child's weight used functionally": Case(built(functional_weight, child=linear()), normal(D)),
    "child's weight, child not called": Case(
        built(functional_weight_alone, child=lambda: nn.Linear(D, D, bias=False)), normal(D)
    ),
    "parameters on a module": Case(
        built(
            direct_parameters,
            scale=parameter(D),
            shift=parameter(D),
            matrix=parameter(D, 3),
            other=parameter(D, 3),
        ),
        normal(D),
    ),
    "scalar parameter": Case(
        built(scalar_parameter, first=linear(), temperature=parameter()), normal(D)
    ),
    "functional_call": Case(built(functional_call, child=linear()), normal(D)),
    # position embeddings
    **{
        f"{name}{', square' if length == SQUARE else ''}": Case(
            built(
                forward,
                first=lambda: nn.Embedding(7, D),
                position=lambda: nn.Embedding(SQUARE, D),
                second=linear(),
            ),
            tokens(length),
        )
        for name, forward in {
            "positions (T, D)": positions_broadcast,
            "positions (1, T, D)": positions_broadcast_by_one,
            "positions expanded": positions_expanded,
        }.items()
        for length in (T, SQUARE)
    },
    **{
        f"positions and class token as parameters{name}": Case(
            built(
                positions_as_parameter,
                first=linear(),
                token=parameter(1, 1, D),
                position=parameter(1, SQUARE + 1, D),
                second=linear(),
            ),
            normal(length, D),
        )
        for name, length in {"": T, ", square": SQUARE, ", square with token": SQUARE - 1}.items()
    },
    # where the batch is
    "folded sequence": Case(built(folded, first=linear(), second=linear()), normal(T, D)),
    "folded sequence of one": Case(built(folded, first=linear(), second=linear()), normal(1, D)),
    "folded frames": Case(
        built(folded_frames, first=lambda: nn.Conv2d(2, 3, 3)), normal(T, 2, 4, 4)
    ),
    "time first": Case(built(time_first, first=linear(), second=linear()), normal(T, D)),
    "time first, square": Case(
        built(time_first, first=linear(), second=linear()), normal(SQUARE, D)
    ),
    "features first": Case(built(features_first, first=linear(D, 3)), normal(D)),
    "sorted and back": Case(
        built(sorted_and_back, first=linear(), second=linear()),
        lambda: (torch.randn(B, D), torch.randperm(B)),
    ),
    "experts": Case(built(routed, first=linear(), second=linear()), normal(D)),
    # samples that see each other
    "centred by the batch": Case(built(centred, first=linear(), second=linear()), normal(D)),
    "attention over the batch": Case(
        built(attention_over_the_batch, first=linear(), second=linear()), normal(D)
    ),
    "in-batch negatives": Case(
        built(in_batch_negatives, first=linear(), second=linear()),
        lambda: (torch.randn(B, D), torch.randn(B, D)),
    ),
    "BatchNorm, train": Case(mlp(lambda: nn.BatchNorm1d(D), nn.ReLU), normal(D)),
    "BatchNorm, eval": Case(lambda: mlp(lambda: nn.BatchNorm1d(D), nn.ReLU)().eval(), normal(D)),
    "BatchNorm and dropout": Case(mlp(lambda: nn.BatchNorm1d(D), nn.Dropout), normal(D)),
    "BatchNorm without statistics": Case(
        mlp(lambda: nn.BatchNorm1d(D, track_running_stats=False)), normal(D)
    ),
    "convolutions with BatchNorm": Case(
        built(
            batch_norms,
            conv=lambda: nn.Conv2d(1, 2, 3, bias=False),
            norm=lambda: nn.BatchNorm2d(2),
            head=linear(8, 3),
        ),
        normal(1, 4, 4),
    ),
    # recurrence
    **{
        f"{kind.__name__}{', two layers both ways' if options else ''}": Case(
            built(
                recurrent,
                cell=lambda kind=kind, options=options: kind(D, 3, batch_first=True, **options),
                head=linear(6 if options else 3, 2),
            ),
            normal(T, D),
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for options in ({}, {"num_layers": 2, "bidirectional": True})
    },
    "LSTM, time first": Case(
        built(recurrent_time_first, cell=lambda: nn.LSTM(D, 3), head=linear(3, 2)), normal(T, D)
    ),
    "LSTM, packed": Case(
        built(packed, cell=lambda: nn.LSTM(D, 3, batch_first=True), head=linear(3, 2)), lengths
    ),
    "GRUCell": Case(
        built(unrolled, cell=lambda: nn.GRUCell(D, D), head=linear(D, 2)), normal(T, D)
    ),
    # attention
    "MultiheadAttention": Case(
        built(
            self_attention,
            attention=lambda: nn.MultiheadAttention(D, 2, batch_first=True),
            head=linear(D, 2),
        ),
        normal(T, D),
    ),
    **{
        f"MultiheadAttention, time first{', square' if length == SQUARE else ''}": Case(
            built(
                self_attention_time_first,
                attention=lambda: nn.MultiheadAttention(D, 2),
                head=linear(D, 2),
            ),
            normal(length, D),
        )
        for length in (T, SQUARE)
    },
    "fused attention": Case(
        built(fused_attention, qkv=linear(D, 3 * D), head=linear(D, 2)), normal(T, D)
    ),
    "TransformerEncoderLayer": Case(
        built(encoder, layer=encoder_layer(batch_first=True), head=linear(D, 2)), normal(T, D)
    ),
    "TransformerEncoderLayer, norm first, dropout": Case(
        built(
            encoder,
            layer=encoder_layer(batch_first=True, norm_first=True, dropout=0.3),
            head=linear(D, 2),
        ),
        normal(T, D),
    ),
    "TransformerEncoderLayer, time first": Case(
        built(
            lambda self, x: encoder(self, x.transpose(0, 1)).transpose(0, 1),
            layer=encoder_layer(),
            head=linear(D, 2),
        ),
        normal(T, D),
    ),
    "TransformerDecoderLayer": Case(
        built(
            decoder,
            layer=lambda: nn.TransformerDecoderLayer(D, 2, 8, 0.0, batch_first=True),
            head=linear(D, 2),
        ),
        lambda: (torch.randn(B, T, D), torch.randn(B, 3, D)),
    ),
    # layers and parameters
    "dropout": Case(mlp(nn.ReLU, nn.Dropout), normal(D)),
    "frozen weights (BitFit)": Case(frozen(mlp(nn.ReLU), "weight"), normal(D)),
    "frozen first layer": Case(frozen(mlp(nn.ReLU), "0."), normal(D)),
    "frozen last layer": Case(frozen(mlp(nn.ReLU), "2."), normal(D)),
    "unused parameters": Case(built(unused_branch, first=linear(), second=linear()), normal(D)),
    "LoRA": Case(LoRA, normal(D)),
    "Bilinear": Case(
        built(lambda self, x, y: self.first(x, y), first=lambda: nn.Bilinear(D, D, 2)),
        lambda: (torch.randn(B, D), torch.randn(B, D)),
    ),
    "PReLU": Case(mlp(lambda: nn.PReLU(D)), normal(D)),
    "U-Net": Case(
        built(
            unet,
            down=lambda: nn.Conv2d(1, 2, 3, padding=1),
            middle=lambda: nn.Conv2d(2, 3, 3, padding=1),
            norm=lambda: nn.GroupNorm(1, 3),
            out=lambda: nn.ConvTranspose2d(5, 2, 1),
        ),
        normal(1, 4, 4),
    ),
    "EmbeddingBag": Case(lambda: nn.EmbeddingBag(7, D), tokens()),
    "EmbeddingBag, max": Case(lambda: nn.EmbeddingBag(7, D, mode="max"), tokens()),
    "sparse embedding": Case(
        lambda: nn.Sequential(nn.Embedding(7, D, sparse=True), nn.Linear(D, 2)), tokens()
    ),
    "padded embedding": Case(
        lambda: nn.Sequential(nn.Embedding(7, D, padding_idx=1), nn.Linear(D, 2)), tokens()
    ),
    "embedding scaled by frequency": Case(
        lambda: nn.Embedding(7, D, scale_grad_by_freq=True), tokens()
    ),
    "renormalised embedding": Case(lambda: nn.Embedding(7, D, max_norm=1.0), tokens()),
    "spectral_norm": Case(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, D)), nn.Linear(D, 2)),
        normal(D),
    ),
    "weight_norm": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, D)), nn.Linear(D, 2)),
        normal(D),
    ),
    "orthogonal": Case(
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(D, D)), nn.Linear(D, 2)),
        normal(D),
    ),
    "no double backward": Case(
        built(through_a_custom_function, first=linear(), norm=lambda: nn.BatchNorm1d(D)), normal(D)
    ),
    # passes
    "checkpointing": Case(
        built(checkpointed, first=linear(), second=linear(), third=linear()), normal(D)
    ),
    "torch.compile, eager": Case(compiled("eager"), normal(D)),
    "torch.compile, aot_eager": Case(compiled("aot_eager"), normal(D)),
}
