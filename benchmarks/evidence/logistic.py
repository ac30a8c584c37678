"""Logistic regression with the worst losses in mind: losses, gradients, and the certified optimum.

The losses are convex and smooth,

    l_i(t) = log(1 + exp(-y_i <x_i, t>)) + (ridge / 2) |t|^2,      y_i = -1 or 1,

and so their worst-k mean F(t) = max over |A| = k of (1/k) sum_A l_i(t) is convex, but has kinks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import brentq, linprog, minimize
from torch import Tensor

from irw_optim.weighting import worst_off_count

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Logistic:
    """N samples: inputs x (N, P) and labels y (N,) of -1 and 1, in float64."""

    x: Tensor
    y: Tensor
    ridge: float = 0.0

    def losses(self, theta: Tensor) -> Tensor:
        """(N,) at theta (P,)."""
        margins = self.y * (self.x @ theta)
        return torch.nn.functional.softplus(-margins) + self.ridge / 2 * theta.square().sum()

    def gradients(self, theta: Tensor) -> Tensor:
        """G, (N, P): one row a sample."""
        pull = -self.y * torch.sigmoid(-self.y * (self.x @ theta))
        return pull[:, None] * self.x + self.ridge * theta


@dataclass(frozen=True)
class Optimum:
    """A point, F there, and a lower bound of F everywhere: the optimum is between the two."""

    theta: Tensor
    value: float
    bound: float


def worst_mean(losses: Tensor, alpha: float) -> float:
    """F: the mean of the k largest losses."""
    return float(losses.topk(worst_off_count(len(losses), alpha)).values.mean())


def optimum(problem: Logistic, alpha: float, smoothing: float = 1e-6) -> Optimum:
    """The minimum of F by L-BFGS on ever less smoothed forms of it, with a proof of its value.

    F(t) is the maximum of sum_i v_i l_i(t) over weights v with sum 1 and 0 <= v_i <= 1/k. Taking
    (mu k / 2) |v|^2 off makes it smooth, and costs at most mu / 2. Its maximiser v proves a lower
    bound: h(t) = sum_i v_i l_i(t) never exceeds F, and is ridge-strongly convex, so that

        min F >= min h >= h(t) - |grad h(t)|^2 / (2 ridge)     at any t.
    """
    k = worst_off_count(len(problem.y), alpha)
    x, signs = problem.x.numpy(), problem.y.numpy()
    rows = -signs[:, None] * x

    def weighted(theta: Vector, mu: float) -> tuple[Vector, Vector, Vector]:
        scores = rows @ theta
        losses = np.logaddexp(0, scores) + problem.ridge / 2 * theta @ theta
        v = smoothed_maximiser(losses, k, mu)
        return losses, v, rows.T @ (v / (1 + np.exp(-scores))) + problem.ridge * theta

    def objective(theta: Vector, mu: float) -> tuple[float, Vector]:
        losses, v, gradient = weighted(theta, mu)
        return float(v @ losses - mu * k / 2 * v @ v), gradient

    theta = np.zeros(x.shape[1])
    value, bound, best = np.inf, -np.inf, theta
    mu = 1.0
    while mu >= smoothing:
        options = {"maxiter": 5000, "maxfun": 20_000, "ftol": 0, "gtol": 1e-8, "maxcor": 50}
        theta = minimize(objective, theta, (mu,), method="L-BFGS-B", jac=True, options=options).x
        losses, v, gradient = weighted(theta, mu)
        bound = max(bound, float(v @ losses - gradient @ gradient / (2 * problem.ridge)))
        reached = float(np.sort(losses)[-k:].mean())
        if reached < value:
            value, best = reached, theta
        mu /= 10**0.5
    return Optimum(torch.from_numpy(best.copy()), value, bound)


def smoothed_maximiser(losses: Vector, k: int, mu: float) -> Vector:
    """Weights v, 0 <= v_i <= 1/k and sum 1, with the largest v @ losses - (mu k / 2) v @ v.

    They are v_i = clip((l_i - tau) / mu, 0, 1) / k with the tau at which they sum to 1.
    """
    if k == len(losses):
        return np.full(k, 1 / k)

    def excess(tau: float) -> float:
        return float(np.clip((losses - tau) / mu, 0, 1).sum()) - k

    tau = brentq(excess, losses.min() - mu, losses.max(), xtol=1e-15, rtol=1e-15)
    v = np.clip((losses - tau) / mu, 0, 1)
    weights: Vector = v / v.sum()
    return weights


def silent_share(problem: Logistic) -> float:
    """The largest alpha at which t = 0, the model that says nothing, minimises F.

    At t = 0 all losses are ln 2, and the subgradients of F are -1/2 sum_i v_i y_i x_i with any v
    of sum 1 and 0 <= v_i <= 1/k. So 0 is optimal iff some v makes that sum vanish; the least
    possible max_i v_i of such v is a linear programme, and its inverse is N times the share.
    """
    pulls = (problem.y[:, None] * problem.x).numpy()
    n, p = pulls.shape
    below_the_cap = sparse.hstack([sparse.eye(n), -np.ones((n, 1))])
    vanishing = np.vstack([np.c_[pulls.T, np.zeros(p)], [*np.ones(n), 0.0]])
    found = linprog(
        [*np.zeros(n), 1.0],
        A_ub=below_the_cap,
        b_ub=np.zeros(n),
        A_eq=vanishing,
        b_eq=[*np.zeros(p), 1.0],
        method="highs",
    )
    return float(1 / (n * found.x[-1])) if found.status == 0 else 0.0
