"""Random models: hypothesis draws `functools.partial` objects, and prints them as built."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import fuzz_blocks as blocks
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

CLASSES = 3
TOKENS = 7


class Blueprint(NamedTuple):
    """How to build a model, and what it reads and returns."""

    kind: str
    width: int
    start: Any
    blocks: tuple[Any, ...]
    head: tuple[Any, ...]
    tied: bool
    per_token: bool

    def build(self) -> nn.Module:
        return blocks.Model(self.start, self.blocks, self.head, self.tied)

    @property
    def classes(self) -> int:
        return TOKENS if self.tied else CLASSES


def pick(draw, *values):
    return draw(st.sampled_from(values))


def flag(draw) -> bool:
    return draw(st.booleans())


def parametrized(width: int, name: str) -> nn.Module:
    return getattr(parametrizations, name)(nn.Linear(width, width))


@st.composite
def models(draw, kind: str, focus: tuple[str, ...] = ()) -> Blueprint:
    """A model that reads ``kind``: vector, tokens, sequence, or map1 to map3.

    Args:
        draw: of hypothesis.
        kind: of the input.
        focus: names of blocks of which one must be there.
    """
    width = pick(draw, 4, 6)
    inside, start, tied = kind, None, False
    if kind == "tokens":
        inside, start = embedding(draw, width, in_bags=not focus)
    chosen = [block(draw, inside, width) for _ in range(draw(st.integers(0, 2)))]
    if focus:
        chosen.append(BLOCKS[pick(draw, *focus)](draw, inside, width))
    chosen += [block(draw, inside, width) for _ in range(draw(st.integers(0, 1)))]

    per_token = inside == "sequence" and pick(draw, False, False, True)
    head: list[Any] = []
    if inside != "vector" and not per_token:
        head.append(partial(blocks.Pool, inside, pick(draw, "mean", "largest", "last")))
    if start is not None and start.func is nn.Embedding and not start.keywords:
        tied = flag(draw)
    head.append(partial(nn.Linear, width, TOKENS if tied else CLASSES))
    return Blueprint(kind, width, start, tuple(chosen), tuple(head), tied, per_token)


def embedding(draw, width: int, in_bags: bool):
    if in_bags and pick(draw, False, False, True):
        mode = pick(draw, "mean", "sum", "max")
        padding = pick(draw, None, 1)
        sparse = mode != "max" and flag(draw)
        options = {"mode": mode, "padding_idx": padding, "sparse": sparse}
        return "vector", partial(nn.EmbeddingBag, TOKENS, width, **options)
    options = pick(
        draw,
        {},
        {},
        {"padding_idx": 1},
        {"sparse": True},
        {"sparse": True, "padding_idx": 0},
        {"scale_grad_by_freq": True},
        {"max_norm": 1.0},
    )
    return "sequence", partial(nn.Embedding, TOKENS, width, **options)


# Blocks by name: every one is ``(draw, kind, width) -> partial`` ---------------------------------


def linear(draw, kind, width):
    make = partial(nn.Linear, width, width, bias=pick(draw, True, True, False))
    if kind != "sequence":
        return make
    how = draw(st.integers(0, 5))
    if how < 2:
        return make
    if how == 2:
        return partial(blocks.TimeFirst, make)
    if how == 3:
        return partial(blocks.ByKeyword, make)
    return partial(blocks.Folded, how == 4, make)


def activation(draw, kind, width):
    return pick(
        draw,
        nn.ReLU,
        partial(nn.ReLU, inplace=True),
        nn.Tanh,
        nn.GELU,
        partial(nn.SiLU, inplace=True),
        nn.PReLU,
        partial(nn.LeakyReLU, 0.2, inplace=True),
        nn.Softplus,
    )


def dropout(draw, kind, width):
    return partial(nn.Dropout, pick(draw, 0.2, 0.5), inplace=flag(draw))


def last_dimension_norm(draw, kind, width):
    norm = pick(draw, nn.LayerNorm, nn.RMSNorm)
    affine = pick(draw, True, True, False)
    return partial(norm, width, elementwise_affine=affine)


def batch_norm(draw, kind, width):
    dims = 1 if kind in ("vector", "sequence") else int(kind[-1])
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    how = pick(draw, "train", "train", "eval", "without statistics")
    make = partial(norm, width, track_running_stats=how != "without statistics")
    if how == "eval":
        make = partial(blocks.NormInEval, make)
    return partial(blocks.AsMap, make) if kind == "sequence" else make


def channel_norm(draw, kind, width):
    if kind == "vector" or flag(draw):
        make = partial(nn.GroupNorm, pick(draw, 1, 2), width)
    else:
        dims = 1 if kind == "sequence" else int(kind[-1])
        norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
        running = flag(draw)
        make = partial(norm, width, affine=True, track_running_stats=running)
        if running and flag(draw):
            make = partial(blocks.NormInEval, make)
    return partial(blocks.AsMap, make) if kind == "sequence" else make


def convolution(draw, kind, width):
    dims = 1 if kind == "sequence" else int(kind[-1])
    groups = pick(draw, 1, 1, 2, width)
    bias = pick(draw, True, True, False)
    if flag(draw):
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options: dict[str, Any] = {"kernel_size": pick(draw, 1, 2, 3)}
        how = pick(draw, "zeros", "zeros", "same", "reflect", "replicate", "circular")
        if how == "same" or kind == "sequence":
            options |= {"padding": "same", "kernel_size": pick(draw, 1, 3)}
        else:
            options |= {"padding": 1, "stride": pick(draw, 1, 2), "padding_mode": how}
        if how in ("zeros", "same"):
            options["dilation"] = pick(draw, 1, 1, 2)
    else:
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        stride = pick(draw, 1, 2)
        options = {"kernel_size": pick(draw, 1, 2, 3), "stride": stride}
        if stride > 1:
            options["output_padding"] = pick(draw, 0, 1)
        if kind == "sequence":
            options = {"kernel_size": 3, "padding": 1}
    make = partial(layer, width, width, groups=groups, bias=bias, **options)
    return partial(blocks.AsMap, make) if kind == "sequence" else make


def direct(draw, kind, width):
    spatial = int(kind[-1]) if kind.startswith("map") else 0
    if spatial:
        operation = pick(draw, "add", "add to", "multiply", "multiply to", "subtract", "in place")
        leading = pick(draw, (width,), (1, width))
        return partial(blocks.Direct, operation, *leading, *[1] * spatial)
    operation = pick(
        draw,
        "add",
        "add to",
        "multiply",
        "multiply to",
        "subtract",
        "divide",
        "temperature",
        "in place",
        "matrix",
        "einsum",
    )
    if operation == "temperature":
        return partial(blocks.Direct, operation)
    if operation in ("matrix", "einsum"):
        return partial(blocks.Direct, operation, width, width)
    return partial(blocks.Direct, operation, *pick(draw, (width,), (1, width), (1,)))


def shared(draw, kind, width):
    how = draw(st.integers(0, 4))
    if how == 0:
        return partial(blocks.Functional, width, flag(draw))
    if how == 1:
        return partial(blocks.TiedPair, width, flag(draw))
    if how == 2:
        return partial(blocks.LoRA, width)
    if how == 3:
        return partial(blocks.Bilinear, width)
    return partial(parametrized, width, pick(draw, "weight_norm", "spectral_norm"))


def nested(draw, kind, width):
    wrapper = pick(
        draw,
        blocks.Residual,
        blocks.ResidualInPlace,
        blocks.Twice,
        blocks.Checkpointed,
        blocks.Unused,
    )
    names = KEEPING_SHAPE[kind]
    if wrapper is blocks.Checkpointed:  # its second forward moves buffers on again, as in torch
        with_buffers = ("batch norm", "channel norm", "shared parameters")
        names = tuple(name for name in names if name not in with_buffers)
    inner = pick(draw, *names)
    makers = [BLOCKS[inner](draw, kind, width)]
    if flag(draw):
        makers.append(activation(draw, kind, width))
    return partial(wrapper, *makers)


def mixing(draw, kind, width):
    make = partial(nn.Linear, width, width)
    wrapper = pick(draw, blocks.Centred, blocks.BatchAttention, blocks.Experts)
    if kind != "vector" or wrapper is blocks.Centred:
        return partial(blocks.Centred, make)
    return partial(wrapper, width) if wrapper is blocks.Experts else partial(wrapper, make)


def positions(draw, kind, width):
    how = pick(
        draw, "(T, d)", "(1, T, d)", "expanded", "parameter (T, d)", "parameter (1, T, d)", "token"
    )
    return (
        partial(blocks.ClassToken, width)
        if how == "token"
        else partial(blocks.Positions, width, how)
    )


def recurrent(draw, kind, width):
    if pick(draw, False, False, False, True):
        return partial(blocks.Unrolled, pick(draw, "RNNCell", "GRUCell", "LSTMCell"), width)
    return partial(
        blocks.Recurrent,
        pick(draw, "RNN", "GRU", "LSTM"),
        width,
        pick(draw, "batch first", "time first", "packed"),
        layers=pick(draw, 1, 1, 2),
        both_ways=flag(draw),
    )


def attention(draw, kind, width):
    how = draw(st.integers(0, 4))
    if how < 2:
        options = pick(draw, {}, {}, {"bias": False}, {"add_bias_kv": True}, {"dropout": 0.2})
        return partial(
            blocks.Attention,
            width,
            flag(draw),
            flag(draw),
            pick(draw, False, False, True),
            **options,
        )
    if how == 2:
        return partial(blocks.FusedAttention, width, flag(draw))
    if how == 3:
        return partial(blocks.Decoder, width)
    options = {
        "dropout": pick(draw, 0.0, 0.2),
        "norm_first": flag(draw),
        "activation": pick(draw, "relu", "gelu"),
        "batch_first": flag(draw),
    }
    layer = partial(nn.TransformerEncoderLayer, width, 2, 5, **options)
    return layer if options["batch_first"] else partial(blocks.TimeFirst, layer)


def pooling(draw, kind, width):
    dims = int(kind[-1])
    return pick(
        draw,
        partial((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1], 2, ceil_mode=True),
        partial((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1], 2, ceil_mode=True),
        partial(nn.Upsample, scale_factor=2),
    )


BLOCKS = {
    "linear": linear,
    "activation": activation,
    "dropout": dropout,
    "last-dimension norm": last_dimension_norm,
    "batch norm": batch_norm,
    "channel norm": channel_norm,
    "convolution": convolution,
    "direct parameters": direct,
    "shared parameters": shared,
    "nested": nested,
    "mixing": mixing,
    "positions": positions,
    "recurrent": recurrent,
    "attention": attention,
    "pooling": pooling,
}

_EVERYWHERE = ("activation", "dropout", "batch norm", "channel norm", "direct parameters", "nested")
_DENSE = (*_EVERYWHERE, "linear", "last-dimension norm", "shared parameters", "mixing")
_MAPS = (*_EVERYWHERE, "convolution", "pooling")
OF_KIND = {
    "vector": _DENSE,
    "sequence": (*_DENSE, "convolution", "positions", "recurrent", "attention"),
    "map1": _MAPS,
    "map2": _MAPS,
    "map3": _MAPS,
}
_STEADY = ("direct parameters", "batch norm", "channel norm", "dropout")
KEEPING_SHAPE = {
    "vector": (*_STEADY, "linear", "last-dimension norm", "shared parameters"),
    "sequence": (
        *_STEADY,
        "linear",
        "last-dimension norm",
        "shared parameters",
        "recurrent",
        "attention",
    ),
    "map1": _STEADY,
    "map2": _STEADY,
    "map3": _STEADY,
}


def block(draw, kind, width):
    return BLOCKS[pick(draw, *OF_KIND[kind])](draw, kind, width)
