"""No static look at modules proves the ghost products exact; comparing them with autograd does.

A forward may mix samples (``h - h.mean(0)``), use a child's weight behind its back, or fold the
batch dimension. Each shows as a difference in a row of G, or in the sum of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    ordered = losses.detach().argsort()
    probes = [torch.ones_like(losses)]
    probes += [_one_hot(losses, int(i)) for i in {int(ordered[0]), int(ordered[-1])}]
    wrong: dict[Tensor, float] = {}
    for probe in probes:
        truth = backward_to(parameters, losses, probe, retain_graph=True)
        claim = gradients.combine(probe)
        total = sum((float(t.to_dense().norm()) ** 2 for t in truth if t is not None), 0.0) ** 0.5
        for parameter, t in zip(parameters, truth, strict=True):
            t = torch.zeros_like(parameter) if t is None else t.to_dense()
            c = claim.get(parameter)
            difference = t if c is None else t - c
            size = float(t.float().norm())
            tolerance = max(_TOLERANCE.get(d, 1e-3) for d in (t.dtype, *_dtypes(gradients)))
            error, unit = float(difference.float().norm()), max(size, _NOISE * total)
            if error > tolerance * unit:
                wrong[parameter] = error / unit if unit else math.inf
    return wrong


def _one_hot(losses: Tensor, sample: int) -> Tensor:
    one = torch.zeros_like(losses)
    one[sample] = 1
    return one


def _dtypes(gradients: GhostGradients) -> set[torch.dtype]:
    return {call.precision for call in gradients.calls}
