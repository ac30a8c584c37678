"""Which samples are outliers, from the inner products of their gradients alone: the O of IRWO.

The whole of it, for per-sample gradients G (B x P) whose Gram matrix is K = G G^T::

    D   = distances(K)                         # D_ij = |g_i - g_j|
    eps = auto_eps(D, min_samples=5)           # removes at most a share 1 - quantile
    out = dbscan_noise(D, eps, min_samples=5)  # True: noise in the sense of DBSCAN

and ``DBSCANFilter()(K)`` in one call. Noise needs no clustering: a sample is noise iff it is no
core point and no core point lies within ``eps`` (Ester, Kriegel, Sander and Xu 1996, definitions
2 and 6). That is two comparisons on the device that holds K, with labels equal to scikit-learn's.

An outlier filter cannot tell a corrupted sample from a rare group: it can remove the very minority
that IRW is there for. Look at who leaves before trusting it (`cluster_labels` helps).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from irw_optim.arguments import as_real, as_whole


class OutlierFilter(Protocol):
    """What IRWO takes as ``outliers=``: any callable from a Gram matrix to a mask.

    ``filter(gram)`` is given K = G G^T, of shape (B, B), and returns (B,) bool on the same device,
    True for the samples to remove. It must not remove everybody.

    >>> def largest_norm(gram):
    ...     return gram.diagonal() == gram.diagonal().max()
    >>> outliers: OutlierFilter = largest_norm
    >>> outliers(torch.diag(torch.tensor([1.0, 4.0, 1.0])))
    tensor([False,  True, False])
    """

    def __call__(self, gram: Tensor, /) -> Tensor:
        """Return the mask of the samples to remove."""
        ...


@dataclass(frozen=True)
class DBSCANFilter:
    """DBSCAN's noise among the per-sample gradients, as an outlier filter (IRWO).

    Where DBSCAN calls every sample noise (always so if B < ``min_samples``), everything is kept:
    nothing is left that anybody could be an outlier of. `noise` shows the labels before that.

    Args:
        eps: radius of the neighbourhood, in units of gradient norm, >= 0 (0: only exact
            duplicates are neighbours); or ``"auto"`` for `auto_eps` on every batch. Gradient norms
            shrink by orders of magnitude in training, so that a fixed radius ends up calling
            everything or nothing noise.
        min_samples: neighbours that make a core point, itself counted.
        quantile: for ``"auto"``, the least share of the batch to keep, in (0, 1]. At 0.95 nobody
            leaves a batch of fewer than 20.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range.

    >>> gradients = torch.tensor([[1.0, 0.0], [1.1, 0.0], [1.0, 0.1], [0.0, 9.0]])
    >>> DBSCANFilter(eps=0.5, min_samples=3)(gradients @ gradients.T)
    tensor([False, False, False,  True])
    >>> DBSCANFilter(eps=0.01, min_samples=3)(gradients @ gradients.T)  # all noise: all kept
    tensor([False, False, False, False])
    """

    eps: float | Literal["auto"] = "auto"
    min_samples: int = 5
    quantile: float = 0.95

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "min_samples": _check_min_samples(self.min_samples),
            "quantile": _check_quantile(self.quantile),
        }
        if not (isinstance(self.eps, str) and self.eps == "auto"):
            checked["eps"] = _check_eps(self.eps, allowed='a number >= 0 or "auto"')
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen for everybody else

    def __call__(self, gram: Tensor, /) -> Tensor:
        """Return the outliers, (B,) bool, for ``gram`` of shape (B, B); never all of them.

        Raises:
            FloatingPointError: ``gram`` holds NaN or infinity.
            TypeError: ``gram`` is no tensor.
            ValueError: ``gram`` is not square.
        """
        noise = self.noise(gram)
        return noise & ~noise.all()

    def noise(self, gram: Tensor) -> Tensor:
        """Return DBSCAN's own verdict, (B,) bool: all True where a call keeps everything."""
        D = distances(gram)
        return dbscan_noise(D, self.radius(D), self.min_samples)

    def radius(self, distances: Tensor) -> float | Tensor:
        """Return the ``eps`` for one batch, in units of gradient norm."""
        if self.eps == "auto":
            return auto_eps(distances, self.min_samples, self.quantile)
        return self.eps


def distances(gram: Tensor) -> Tensor:
    """Euclidean distances between the rows of G: D_ij^2 = K_ii + K_jj - 2 K_ij, clamped at 0.

    The difference cancels: distances below about sqrt(machine epsilon) times the gradient norm are
    rounding (3e-4 of the norm in float32), so that equal gradients may come out that far apart.

    Args:
        gram: (B, B), K = G G^T.

    Returns:
        (B, B) in the dtype of ``gram``, float32 at least; symmetric, and exactly 0 on the diagonal.

    Raises:
        FloatingPointError: ``gram`` holds NaN or infinity, or too large numbers for its dtype.
        TypeError: ``gram`` is no tensor.
        ValueError: ``gram`` is not square.

    >>> gradients = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> distances(gradients @ gradients.T)
    tensor([[0., 5.],
            [5., 0.]])
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram={gram!r}: expected a tensor of shape (B, B), G @ G.T")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram has shape {tuple(gram.shape)}: expected (B, B), G @ G.T")
    K = gram.detach().to(torch.promote_types(gram.dtype, torch.float32))
    norms = K.diagonal()
    # Exactly 0 on the diagonal, and symmetric, which rounded products need not be: to each other,
    # two samples must be equally near.
    squares = (K + K.T).neg_().add_(norms[:, None] + norms)
    # The one wait for the device. Later, clamp would turn K_ij = inf into a distance of 0.
    if not squares.sum().isfinite() and not squares.isfinite().all():  # the first is cheaper
        broken = ~norms.isfinite() if not norms.isfinite().all() else ~squares.isfinite().all(1)
        raise FloatingPointError(
            f"gram is not finite for the samples {broken.nonzero().flatten().tolist()}: "
            f"their gradients hold NaN or infinity, or their squares overflow {K.dtype}; "
            "leave these samples out, or pass gram.double() computed in float64"
        )
    return squares.clamp_(min=0).sqrt_()


def dbscan_noise(distances: Tensor, eps: float | Tensor, min_samples: int) -> Tensor:
    """The samples that DBSCAN labels -1: no core point, and no core point within ``eps``.

    Equal to ``sklearn.cluster.DBSCAN(eps, min_samples=min_samples, metric="precomputed")`` on
    every input. scikit-learn refuses ``eps=0``; here it makes duplicates the only neighbours.

    Args:
        distances: (B, B), finite, as from `distances`.
        eps: radius, >= 0; a sample at exactly this distance is a neighbour.
        min_samples: neighbours that make a core point, itself counted.

    Returns:
        (B,) bool, True for noise.

    Raises:
        TypeError: ``eps`` or ``min_samples`` of another type.
        ValueError: ``eps`` negative or NaN, or ``min_samples`` < 1.

    >>> points = torch.tensor([0.0, 1.0, 2.0, 9.0])
    >>> dbscan_noise((points[:, None] - points).abs(), eps=1.0, min_samples=3)
    tensor([False, False, False,  True])
    """
    if not isinstance(eps, Tensor):  # looking into a tensor would wait for its device
        eps = _check_eps(eps)
    min_samples = _check_min_samples(min_samples)
    near = (distances <= eps).to(torch.float32)  # counts below 2^24 are exact, sums of it quick
    core = near.sum(dim=1) >= min_samples
    within_reach = core.to(near.dtype) @ near > 0
    return ~(core | within_reach)


def auto_eps(distances: Tensor, min_samples: int, quantile: float = 0.95) -> Tensor:
    """A radius for DBSCAN that removes at most the share ``1 - quantile`` of a batch.

    The ``quantile`` of the distances to the (``min_samples`` - 1)-th neighbour, itself not counted:
    the least of these distances that reaches the share ``quantile`` of the batch. Whoever has that
    neighbour within eps is a core point, and core points are not noise. (Interpolated quantiles
    give no such bound: the linear one of B = 10 at 0.95 leaves 1 of 10 outside.)

    Args:
        distances: (B, B), finite, with diagonal 0, as from `distances`.
        min_samples: neighbours that make a core point, itself counted.
        quantile: least share of the batch to keep, in (0, 1].

    Returns:
        The radius, a 0-dim tensor; infinity where B < ``min_samples``, and nobody has so many.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range.

    >>> points = torch.tensor([0.0, 1.0, 2.0, 9.0])
    >>> D = (points[:, None] - points).abs()
    >>> auto_eps(D, min_samples=2, quantile=0.75), auto_eps(D, min_samples=2, quantile=0.76)
    (tensor(1.), tensor(7.))
    """
    min_samples, quantile = _check_min_samples(min_samples), _check_quantile(quantile)
    size = len(distances)
    if size < min_samples:
        return distances.new_tensor(math.inf)
    # topk, and not kthvalue: the latter has no deterministic form on CUDA.
    nearest = distances.topk(min_samples, dim=1, largest=False).values
    reach = nearest.amax(dim=1).sort().values
    kept = math.ceil(quantile * size * (1 - 1e-12))  # an exact product is not rounded up
    return reach[kept - 1]


def cluster_labels(
    gram: Tensor,
    eps: float | Literal["auto"] = "auto",
    min_samples: int = 5,
    quantile: float = 0.95,
) -> Tensor:
    """scikit-learn's DBSCAN labels of the per-sample gradients, to look at clusters and noise.

    Args:
        gram: (B, B), K = G G^T.
        eps: as of `DBSCANFilter`, and so are ``min_samples`` and ``quantile``.
        min_samples: neighbours that make a core point, itself counted.
        quantile: least share of the batch to keep with ``eps="auto"``.

    Returns:
        (B,) int64 on the CPU: the number of the cluster, -1 for noise (`DBSCANFilter.noise`).

    Raises:
        FloatingPointError: ``gram`` holds NaN or infinity.
        TypeError: an argument of another type.
        ValueError: an argument outside its range, or ``gram`` is not square.

    >>> gradients = torch.tensor([[1.0, 0.0], [1.1, 0.0], [-1.0, 0.0], [-1.1, 0.0], [0.0, 9.0]])
    >>> cluster_labels(gradients @ gradients.T, eps=0.5, min_samples=2)
    tensor([ 0,  0,  1,  1, -1])
    """
    from sklearn.cluster import DBSCAN

    outliers = DBSCANFilter(eps, min_samples, quantile)
    D = distances(gram)
    if not len(D):
        return torch.empty(0, dtype=torch.int64)
    # scikit-learn wants a positive, finite radius. The least normal double lies below every
    # distance but 0, the largest finite distance above them all.
    radius = min(max(float(outliers.radius(D)), sys.float_info.min), torch.finfo(D.dtype).max)
    clusters = DBSCAN(eps=radius, min_samples=outliers.min_samples, metric="precomputed")
    return torch.from_numpy(clusters.fit_predict(D.cpu().numpy()))


def _check_eps(eps: object, allowed: str = "a number >= 0") -> float:
    message = f"eps={eps!r}: expected {allowed}, in units of gradient norm"
    if (number := as_real(eps)) is None:
        raise TypeError(message)
    if not number >= 0:  # true for NaN too
        raise ValueError(message)
    return number


def _check_min_samples(min_samples: object) -> int:
    message = f"min_samples={min_samples!r}: expected a whole number >= 1, for example 5"
    if (number := as_whole(min_samples)) is None:
        raise TypeError(message)
    if number < 1:
        raise ValueError(message)
    return number


def _check_quantile(quantile: object) -> float:
    message = f"quantile={quantile!r}: expected a number in (0, 1], the least share to keep"
    if (number := as_real(quantile)) is None:
        raise TypeError(message)
    if not 0 < number <= 1:
        raise ValueError(message)
    return number
