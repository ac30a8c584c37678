"""No static look at modules proves the ghost products exact; comparing them with autograd does.

A forward may mix samples (``h - h.mean(0)``), use a child's weight behind its back, or fold the
batch dimension. Each shows as a difference in a row of G, or in the sum of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from irw_optim.gradients.autodiff import backward_to
from irw_optim.gradients.ghost import GhostGradients

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Far above rounding, far below what any mixing of samples does."""

_NOISE = 1e-2
"""Share of the tolerance under which a difference, relative to the whole gradient, is rounding:
a bias in front of a normalisation has no gradient but noise."""


def compare_with_autograd(
    losses: Tensor, gradients: GhostGradients, parameters: Sequence[Tensor]
) -> dict[Tensor, float]:
    """Compare rows of G, and their sum, with plain autograd, parameter by parameter.

    Two rows are looked at, of the largest and of the smallest loss; mixing shows in any row.

    Args:
        losses: (B,), with their graph, which is retained.
        gradients: the products to check.
        parameters: the leaves that ``gradients`` claims to cover.

    Returns:
        The relative error of each parameter that disagrees.
    """
    wrong: dict[Tensor, float] = {}
    for probe in probes_of(losses):
        truth = backward_to(parameters, losses, probe, retain_graph=True)
        claim = gradients.combine(probe)
        differences = [
            difference(p, torch.zeros_like(p) if t is None else t, claim.get(p), gradients)
            for p, t in zip(parameters, truth, strict=True)
        ]
        wrong.update(wrong_among(differences))
    return wrong


def probes_of(losses: Tensor) -> list[Tensor]:
    """The weights for which the sums of gradients are compared."""
    ordered = losses.detach().argsort()
    rows = {int(ordered[0]), int(ordered[-1])} if len(losses) else set()
    return [torch.ones_like(losses), *[_one_hot(losses, i) for i in rows]]


class Difference(NamedTuple):
    """How far one parameter's gradient is off: ``error`` and ``size`` are norms."""

    parameter: Tensor
    error: float
    size: float
    tolerance: float


def difference(
    parameter: Tensor, truth: Tensor, claim: Tensor | None, gradients: GhostGradients
) -> Difference:
    """Measure one parameter's gradient against autograd's."""
    truth = truth.to_dense()
    off = truth if claim is None else truth - claim
    tolerance = max(_TOLERANCE.get(d, 1e-3) for d in (truth.dtype, *_dtypes(gradients)))
    return Difference(parameter, _norm(off), _norm(truth), tolerance)


def _norm(tensor: Tensor) -> float:
    """Of numbers whose squares float32 may not hold."""
    size = tensor.abs().max() if tensor.numel() else tensor.new_zeros(())
    return float(size) * float((tensor / size).float().norm()) if size else 0.0


def wrong_among(differences: Sequence[Difference]) -> dict[Tensor, float]:
    """The relative error of each parameter that disagrees, for one probe."""
    total = sum((d.size**2 for d in differences), 0.0) ** 0.5
    wrong: dict[Tensor, float] = {}
    for parameter, error, size, tolerance in differences:
        unit = max(size, _NOISE * total)
        if error > tolerance * unit:
            wrong[parameter] = error / unit if unit else math.inf
    return wrong


def _one_hot(losses: Tensor, sample: int) -> Tensor:
    one = torch.zeros_like(losses)
    one[sample] = 1
    return one


def _dtypes(gradients: GhostGradients) -> set[torch.dtype]:
    return {call.precision for call in gradients.calls}
