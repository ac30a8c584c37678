"""Lookups and losses, for `test_pushforward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pushes import case
from torch import Tensor

ROWS = torch.tensor([[1, 0, 3, 3], [2, 2, 0, 1]])
FLAT, STARTS = torch.tensor([1, 0, 3, 3, 2]), torch.tensor([0, 2, 2])


def _bags(mode: str, **settings: Any) -> Callable[[Tensor], Tensor]:
    return lambda w: F.embedding_bag(FLAT, w, STARTS, mode=mode, **settings)


TABLES = [
    case("embedding", lambda w: (F.embedding(ROWS, w), F.embedding(FLAT[:0], w)), (4, 3)),
    case("embedding padded", lambda w: F.embedding(ROWS, w, padding_idx=0), (4, 3)),
    case("embedding padded last", lambda w: F.embedding(ROWS, w, padding_idx=-1), (4, 3)),
    case(
        "embedding by frequency",
        lambda w: F.embedding(ROWS, w, padding_idx=2, scale_grad_by_freq=True),
        (4, 3),
    ),
    case("embedding sparse", lambda w: F.embedding(ROWS, w, sparse=True), (4, 3)),
    *[case(f"bag {mode}", _bags(mode), (4, 3)) for mode in ("sum", "mean", "max")],
    *[
        case(f"bag {mode} with an end", _bags(mode, include_last_offset=True), (4, 3))
        for mode in ("sum", "mean", "max")
    ],
    *[
        case(f"bag {mode} padded", _bags(mode, padding_idx=3), (4, 3))
        for mode in ("sum", "mean", "max")
    ],
    *[
        case(f"bag {mode} by frequency", _bags(mode, scale_grad_by_freq=True), (4, 3))
        for mode in ("sum", "mean")
    ],
    case("bag sparse", _bags("sum", sparse=True), (4, 3)),
    case("bag of rows", lambda w: F.embedding_bag(ROWS, w), (4, 3)),
    case(
        "bag weighted",
        lambda w, s: F.embedding_bag(FLAT, w, STARTS, mode="sum", per_sample_weights=s),
        (4, 3),
        (5,),
    ),
    case(
        "bag weighted padded",
        lambda w, s: F.embedding_bag(ROWS, w, mode="sum", per_sample_weights=s, padding_idx=3),
        (4, 3),
        (2, 4),
    ),
]

_LABELS = torch.tensor([1, 0, -100])
_CLASSES = torch.tensor([1, 0, 2])
_WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
_TARGETS = torch.tensor([[1, 2, 2], [3, 1, 0]])


def _all_reductions(loss: Callable[..., Tensor], *arguments: Any, **settings: Any) -> Any:
    mean = "batchmean" if loss is F.kl_div else "mean"
    return lambda *x: [loss(*x, *arguments, reduction=r, **settings) for r in ("none", mean, "sum")]


LOSSES = [
    *TABLES,
    case("mse", _all_reductions(F.mse_loss), (3, 4), (3, 4)),
    case("l1", _all_reductions(F.l1_loss), (3, 4), (3, 4)),
    case("smooth l1", _all_reductions(F.smooth_l1_loss, beta=0.5), (3, 4), (3, 4)),
    case("huber", _all_reductions(F.huber_loss, delta=0.5), (3, 4), (3, 4)),
    case("cross entropy", _all_reductions(F.cross_entropy, _LABELS), (3, 4)),
    case(
        "cross entropy weighted",
        lambda x: _all_reductions(F.cross_entropy, _LABELS, weight=_WEIGHT, label_smoothing=0.1)(x),
        (3, 4),
    ),
    case(
        "cross entropy of maps",
        _all_reductions(F.cross_entropy, torch.tensor([[0, 1], [2, -100]]), weight=_WEIGHT),
        (2, 4, 2),
    ),
    case(
        "cross entropy of images",
        _all_reductions(F.cross_entropy, torch.tensor([[[0, 3, 2]]])),
        (1, 4, 1, 3),
    ),
    case("cross entropy of one", lambda x: F.cross_entropy(x, torch.tensor(2)), (4,)),
    case(
        "cross entropy soft",
        lambda x, t: _all_reductions(F.cross_entropy, t.softmax(1))(x),
        (3, 4),
        (3, 4),
    ),
    case("nll", lambda x: F.nll_loss(x, _CLASSES, reduction="none", ignore_index=0), (3, 4)),
    case(
        "nll of uint8",
        lambda x: F.nll_loss(x, torch.tensor([156, 3], dtype=torch.uint8), reduction="none"),
        (2, 200),
    ),
    case(
        "nll with class weights",
        lambda x: F.nll_loss(x, _CLASSES, torch.arange(4.0).to(x), reduction="none"),
        (3, 4),
    ),
    case(
        "nll with class weights at every position",
        lambda x: F.nll_loss(
            x, _CLASSES.expand(3, 2, 3), torch.arange(4.0).to(x), reduction="none", ignore_index=2
        ),
        (3, 4, 2, 3),
    ),
    case("nll of one", lambda x: F.nll_loss(x, _CLASSES[0], reduction="none"), (4,)),
    case(
        "bce",
        lambda x, t: _all_reductions(F.binary_cross_entropy)(x.sigmoid(), t.sigmoid()),
        (3, 4),
        (3, 4),
    ),
    case(
        "bce of logits",
        lambda x, t: _all_reductions(
            F.binary_cross_entropy_with_logits, weight=_WEIGHT, pos_weight=_WEIGHT
        )(x, t.sigmoid()),
        (3, 4),
        (3, 4),
    ),
    case(
        "kl", lambda x, t: _all_reductions(F.kl_div)(x.log_softmax(1), t.softmax(1)), (3, 4), (3, 4)
    ),
    case(
        "kl of logs", lambda x, t: _all_reductions(F.kl_div, log_target=True)(x, t), (3, 4), (3, 4)
    ),
    case(
        "poisson",
        lambda x, t: _all_reductions(F.poisson_nll_loss, full=True)(x, t.exp()),
        (3, 4),
        (3, 4),
    ),
    case(
        "gaussian",
        lambda x, t, v: _all_reductions(F.gaussian_nll_loss)(x, t, v.exp()),
        (3, 4),
        (3, 4),
        (3, 4),
    ),
    case(
        "hinge",
        _all_reductions(F.hinge_embedding_loss, torch.tensor([1.0, -1.0, 1.0, -1.0])),
        (3, 4),
    ),
    case(
        "soft margin", _all_reductions(F.soft_margin_loss, _CLASSES[:, None].double() - 1), (3, 4)
    ),
    case("multi margin", _all_reductions(F.multi_margin_loss, _CLASSES, p=2), (3, 4)),
    case(
        "multilabel margin",
        _all_reductions(F.multilabel_margin_loss, torch.tensor([[3, 0, -1, 1]] * 3)),
        (3, 4),
    ),
    case(
        "multilabel soft",
        _all_reductions(F.multilabel_soft_margin_loss, torch.ones(3, 4).double()),
        (3, 4),
    ),
    case("triplet", _all_reductions(F.triplet_margin_loss, swap=True), (3, 4), (3, 4), (3, 4)),
    case(
        "ranking",
        lambda x, y: _all_reductions(F.margin_ranking_loss)(x, y, torch.ones(3).double()),
        (3,),
        (3,),
    ),
    case(
        "cosine",
        lambda x, y: _all_reductions(F.cosine_embedding_loss)(x, y, _CLASSES - 1),
        (3, 4),
        (3, 4),
    ),
    case(
        "ctc",
        lambda x: [
            F.ctc_loss(
                x.log_softmax(2),
                _TARGETS,
                torch.tensor([6, 5]),
                torch.tensor([3, 2]),
                reduction=r,
                zero_infinity=True,
            )
            for r in ("none", "mean", "sum")
        ],
        (6, 2, 4),
    ),
    case(
        "ctc of one",
        lambda x: F.ctc_loss(
            x.log_softmax(1), _TARGETS[0], torch.tensor(6), torch.tensor(3), reduction="none"
        ),
        (6, 4),
    ),
]
