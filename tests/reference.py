"""The oracle: one IRW step by plain autograd, one sample after the other.

Written from the definitions alone (paper, section III): nothing of the library is imported, so
that no error can be on both sides of a comparison. Everything after the gradients is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Decision(NamedTuple):
    """What the rule makes of one batch; tensors of shape (B,)."""

    worst_off: Tensor
    scores: Tensor
    weights: Tensor
    fallback: bool


class Step(NamedTuple):
    """One batch: its per-sample gradients G (B, P), the decision, and what p.grad must be."""

    losses: Tensor
    G: Tensor
    worst_off: Tensor
    scores: Tensor
    weights: Tensor
    fallback: bool
    gradients: list[Tensor]


def per_sample_gradients(losses: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """G of shape (B, P): one backward pass for each of the B losses."""
    parameters = list(parameters)
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g if g.layout is torch.strided else g.to_dense()
            for p, g in zip(parameters, gradients, strict=True)
        ]
        rows.append(torch.cat([g.flatten() for g in dense]))
    return torch.stack(rows) if rows else torch.zeros(0, sum(p.numel() for p in parameters))


def worst_off(losses: Sequence[float], alpha: float) -> list[int]:
    """Indices of S: the k largest losses; of equal ones, the lower index first."""
    share = Fraction(alpha).limit_denominator(10**9)  # 0.07 means 7 in 100
    k = min(len(losses), max(1, math.ceil(share * len(losses))))
    return sorted(range(len(losses)), key=lambda i: (-losses[i], i))[:k]


def decide(
    losses: Tensor,
    G: Tensor,
    alpha: float,
    *,
    removed: Iterable[int] = (),
    center: float = 0.0,
    labels: Sequence[int] | None = None,
    mix: float = 0.0,
) -> Decision:
    """S, the scores and the weights; ``removed`` are the samples that an outlier filter took."""
    G, size, gone = G.double(), len(losses), set(removed)
    kept = [i for i in range(size) if i not in gone]
    S = [kept[i] for i in worst_off([float(losses[i]) for i in kept], alpha)]

    direction = sum(G[j] for j in S)
    if center:
        direction = direction - center * len(S) * sum(G[i] for i in kept) / len(kept)
    scores = [float(G[i] @ direction) if i in kept else 0.0 for i in range(size)]

    positive = [max(0.0, s) for s in scores]
    groups: dict[int, list[int]] = {}
    for i in kept:
        groups.setdefault(0 if labels is None else int(labels[i]), []).append(i)
    weights = [0.0] * size
    for members in groups.values():
        mass = sum(positive[i] for i in members)
        for i in members:
            share = positive[i] / mass if mass > 0 else 1 / len(members)
            weights[i] = (1 - mix) * share / len(groups) + mix / len(kept)

    return Decision(
        torch.tensor([i in S for i in range(size)], dtype=torch.bool),
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        sum(positive) == 0,
    )


def step(
    losses: Tensor,
    parameters: Iterable[Tensor],
    alpha: float,
    *,
    scored: Iterable[Tensor] | None = None,
    scale: float = 1.0,
    **options: object,
) -> Step:
    """The whole step on losses (B,) with their graph.

    Args:
        losses: per-sample losses.
        parameters: those that are updated.
        alpha: share of the worst-off.
        scored: the parameters whose gradients make the scores; None for all.
        scale: length of the ordinary gradient; B for a criterion with ``reduction="sum"``.
        **options: of `decide`.
    """
    parameters = list(parameters)
    G = per_sample_gradients(losses, parameters)
    chosen = set(parameters if scored is None else scored)
    columns = torch.cat([torch.full((p.numel(),), p in chosen) for p in parameters])
    decision = decide(losses.detach(), G[:, columns], alpha, **options)  # type: ignore[arg-type]
    combined = scale * (decision.weights @ G.double())
    parts = combined.split([p.numel() for p in parameters])
    gradients = [g.view_as(p) for g, p in zip(parts, parameters, strict=True)]
    return Step(losses.detach(), G, *decision, gradients)


def error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest number expected.

    Where that is below ``floor``, relative to ``floor``; where both are 0, absolute.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = float((actual - expected).abs().max())
    if math.isnan(difference):
        return math.inf
    return difference / (max(float(expected.abs().max()), floor) or 1.0)
