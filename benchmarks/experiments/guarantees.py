"""The inequalities of the page on convergence, and its counter-examples, as functions.

F(t)  = mean of the k largest of N losses        g_S / k, a subgradient of F
d     = sum_i w_i g_i with w_i = max(0, s_i) / sum_j max(0, s_j),  s_i = <g_i, g_S>
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.experiments.logistic import Logistic


def alignment_constant(size: int, k: int) -> float:
    """c = 2 / (1 + sqrt(N / k)), the best constant in <d, g_S / k> >= c |g_S / k|^2."""
    return 2 / (1 + math.sqrt(size / k))


def safe_step(losses: Tensor, k: int, d: Tensor, g_S: Tensor, M: float, L: float) -> float:
    """A step size at which the members of S stay the worst off, and F falls.

    min(gap / (2 M |d|), <d, g_S> / (k L |d|^2)), gap = the k-th largest loss minus the next one.

    Args:
        losses: (N,).
        k: size of S.
        d: (P,), the direction of the step.
        g_S: (P,), the summed gradient of S.
        M: a bound on the norms of the gradients, everywhere.
        L: a bound on how fast they change.
    """
    length = float(d.norm())
    if length == 0:
        return 0.0
    bound = float(d @ g_S) / (k * L * length**2)
    if k == len(losses):
        return bound
    largest = losses.topk(k + 1).values
    return min(bound, float(largest[-2] - largest[-1]) / (2 * M * length))


def two_samples() -> Logistic:
    """At t = 0 every IRW step with k = 1, however small, raises F; and 0 is not its minimum."""
    return Logistic(torch.tensor([[-2.0, -1.0], [2.0, -1.0]]).double(), torch.ones(2).double())


def four_samples() -> Logistic:
    """IRW with k = 1 leaves the minimum of F, ln 2 at t = 0, for t = (0, ln(2) / 2).

    There F = ln(1 + sqrt(2)): 27 % above the minimum.
    """
    x = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-5.0, 1.0], [5.0, 1.0]]).double()
    return Logistic(x, torch.ones(4).double())
