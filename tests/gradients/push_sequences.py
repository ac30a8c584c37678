"""Attention and recurrent layers, for `test_pushforward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pushes import Case, case, in_single
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

HEADS = (2, 2, 3, 4)


def _attention(backend: SDPBackend, **settings: Any) -> Callable[..., Tensor]:
    def attend(*tensors: Tensor) -> Tensor:
        missing: RuntimeError | None = None
        with sdpa_kernel(backend):  # which an error leaves in force in older torch
            try:
                return F.scaled_dot_product_attention(*tensors, **settings)
            except RuntimeError as error:
                missing = error
        raise missing

    return attend


_LOWER = torch.ones(3, 3, dtype=torch.bool).tril()
_BLIND = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
_BIAS = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
_LAST_BLIND = _BIAS.masked_fill(~_BLIND, -torch.inf)

_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("causal", {"is_causal": True}),
    ("scaled", {"scale": 0.3}),
    ("masked", {"attn_mask": _LOWER}),
    ("biased", {"attn_mask": _BIAS}),
    ("blind", {"attn_mask": _BLIND}),
    ("blind biased", {"attn_mask": _LAST_BLIND}),
    ("masked by sample", {"attn_mask": torch.stack([_LOWER, _LOWER.flip(1)])[:, None]}),
)

ATTENTION = [
    *[
        case(
            f"attention {name} {backend.name.lower()}",
            _attention(backend, **settings),
            HEADS,
            HEADS,
            HEADS,
        )
        for name, settings in _KINDS
        for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    ],
    case(
        "attention of grouped queries",
        _attention(SDPBackend.MATH, enable_gqa=True),
        (2, 4, 3, 4),
        (2, 2, 5, 4),
        (2, 2, 5, 4),
    ),
    case(
        "attention of fused groups",
        _attention(SDPBackend.FLASH_ATTENTION, enable_gqa=True),
        (2, 4, 3, 4),
        (2, 2, 5, 4),
        (2, 2, 5, 4),
    ),
    case(
        "attention wide",
        _attention(SDPBackend.FLASH_ATTENTION, is_causal=True),
        (1, 2, 2, 4),
        (1, 2, 5, 4),
        (1, 2, 5, 4),
    ),
    case(
        "attention with a learnt bias",
        lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b),
        HEADS,
        HEADS,
        HEADS,
        (3, 3),
    ),
    case("attention of tokens", lambda q: F.scaled_dot_product_attention(q, q, q), (2, 3, 4)),
    case(
        "attention dropped",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        HEADS,
        HEADS,
        HEADS,
    ),
    in_single("attention float32", _attention(SDPBackend.FLASH_ATTENTION), HEADS, HEADS, HEADS),
    case(
        "heads",
        lambda layer, x: layer(x, x, x)[0],
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        (2, 3, 4),
    ),
    case(
        "heads unweighted",
        lambda layer, x, y: layer(x, y, y, need_weights=False, attn_mask=~_LOWER),
        lambda: nn.MultiheadAttention(4, 2, kdim=2, vdim=2),
        (3, 2, 4),
        (3, 2, 2),
    ),
    case(
        "encoder",
        lambda layer, x: layer(x, is_causal=True, src_mask=~_LOWER),
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        (2, 3, 4),
    ),
    case(
        "decoder",
        lambda layer, x, y: layer(x, y),
        lambda: nn.TransformerDecoderLayer(4, 2, 6, 0.0, "gelu", norm_first=True),
        (3, 1, 4),
        (2, 1, 4),
    ),
]


def _recurrent(kind: type[nn.RNNBase], **settings: Any) -> list[Case]:
    name = " ".join([kind.__name__, *[f"{k}={v}" for k, v in settings.items()]])
    shape = (2, 3, 2) if settings.get("batch_first") else (3, 2, 2)

    def run(layer: nn.RNNBase, x: Tensor) -> Any:
        return layer(x)

    def make() -> nn.Module:
        return kind(2, 3, **settings)

    return [case(name, run, make, shape), in_single(f"{name} float32", run, make, shape)]


def _packed(layer: nn.RNNBase, x: Tensor) -> Any:
    packed = pack_padded_sequence(x, torch.tensor([3, 1]))
    output, state = layer(packed)
    return pad_packed_sequence(output)[0], state


def _last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[1][0]


def _cell(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[1][1]


RECURRENT = [
    *[
        one
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for settings in (
            {},
            {"bias": False},
            {"batch_first": True},
            {"bidirectional": True},
            {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
        )
        for one in _recurrent(kind, **settings)
    ],
    _recurrent(nn.LSTM, proj_size=2)[0],
    *_recurrent(nn.RNN, nonlinearity="relu"),
    *[
        Case(
            f"{kind.__name__} packed {dtype}",
            _packed,
            (lambda kind=kind: kind(2, 3, bidirectional=True), (3, 2, 2)),
            dtype,
            tolerance,
        )
        for kind in (nn.LSTM, nn.GRU)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4))
    ],
    *[
        in_single(f"LSTM {name}", run, lambda: nn.LSTM(2, 3), (3, 2, 2))
        for name, run in (("last state", _last), ("last cell", _cell))
    ],
    in_single(
        "LSTM from states",
        lambda layer, x, h, c: layer(x, (h.tanh(), c)),
        lambda: nn.LSTM(2, 3, 2),
        (3, 2, 2),
        (2, 2, 3),
        (2, 2, 3),
    ),
    in_single("LSTM unbatched", lambda layer, x: layer(x), lambda: nn.LSTM(2, 3), (3, 2)),
    case(
        "cells",
        lambda a, b, c, x: [a(x), b(x), c(x)],
        lambda: nn.LSTMCell(2, 3),
        lambda: nn.GRUCell(2, 3),
        lambda: nn.RNNCell(2, 3),
        (2, 2),
    ),
]

SEQUENCES = [*ATTENTION, *RECURRENT]
