"""Which samples are outliers, from K = G G^T alone: the O of IRWO.

A filter cannot tell a corrupted sample from a rare group: it can remove the very minority that IRW
is there for. Look at who leaves before trusting it.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from irw_optim.arguments import real_number, whole_number


class OutlierFilter(Protocol):
    """What ``outliers=`` takes: from K, (B, B), to (B,) bool on its device, True to remove."""

    def __call__(self, gram: Tensor, /) -> Tensor:
        """Return the mask."""


def check_filter(outliers: object) -> None:
    """Raise for what is neither None nor a filter."""
    if isinstance(outliers, type):
        name = outliers.__name__
        raise TypeError(f"outliers={name} is a class: expected an instance, outliers={name}()")
    if outliers is not None and not callable(outliers):
        raise TypeError(f"outliers={outliers!r}: expected None or a filter such as DBSCANFilter()")


@dataclass(frozen=True)
class DBSCANFilter:
    """DBSCAN's noise among the per-sample gradients, as an outlier filter (IRWO).

    Where every sample is noise (always so if B < ``min_samples``), everything is kept.

    Args:
        eps: radius in units of gradient norm, >= 0 (0: exact duplicates alone are neighbours); or
            ``"auto"`` for `auto_eps` on every batch: norms shrink by orders of magnitude in
            training.
        min_samples: neighbours that make a core point, itself counted.
        quantile: for ``"auto"``, the least share of the batch to keep, in (0, 1]. At 0.95 nobody
            leaves a batch of fewer than 20.

    Raises:
        TypeError, ValueError: an argument of another type, or outside its range.

    >>> gradients = torch.tensor([[1.0, 0.0], [1.1, 0.0], [1.0, 0.1], [0.0, 9.0]])
    >>> DBSCANFilter(eps=0.5, min_samples=3)(gradients @ gradients.T)
    tensor([False, False, False,  True])
    """

    eps: float | Literal["auto"] = "auto"
    min_samples: int = 5
    quantile: float = 0.95

    def __post_init__(self) -> None:
        own = vars(self)  # frozen for everybody else
        own["min_samples"] = whole_number("min_samples", self.min_samples, 1)
        own["quantile"] = real_number("quantile", self.quantile, "(0, 1]")
        if not (isinstance(self.eps, str) and self.eps == "auto"):
            unit = 'in units of gradient norm, or "auto"'
            own["eps"] = real_number("eps", self.eps, "[0, inf]", unit)

    def __call__(self, gram: Tensor, /) -> Tensor:
        """Return the outliers, (B,) bool, of ``gram``, (B, B); never all.

        Raises:
            FloatingPointError: ``gram`` holds NaN or infinity.
            TypeError, ValueError: ``gram`` is no tensor of shape (B, B).
        """
        noise = self.noise(gram)
        return noise & ~noise.all()

    def noise(self, gram: Tensor) -> Tensor:
        """Return DBSCAN's own verdict, (B,) bool, which may be all."""
        D = distances(gram)
        return dbscan_noise(D, self.radius(D), self.min_samples)

    def radius(self, distances: Tensor) -> float | Tensor:
        """Return the ``eps`` for one batch."""
        if self.eps == "auto":
            return auto_eps(distances, self.min_samples, self.quantile)
        return self.eps


def distances(gram: Tensor) -> Tensor:
    """Euclidean distances between the rows of G: D_ij^2 = K_ii + K_jj - 2 K_ij, clamped at 0.

    (B, B), float32 at least; symmetric, 0 on the diagonal. The difference cancels: equal gradients
    may be 3e-4 of their norm apart in float32. Raises as `DBSCANFilter.__call__`.
    """
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram={gram!r}: expected a tensor of shape (B, B), G @ G.T")
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram has shape {tuple(gram.shape)}: expected (B, B), G @ G.T")
    K = gram.detach().to(torch.promote_types(gram.dtype, torch.float32))
    norms = K.diagonal()
    # Symmetric, which rounded products need not be.
    squares = (K + K.T).neg_().add_(norms[:, None] + norms)
    # Before clamp turns K_ij = inf into a distance of 0; the one wait for the device.
    if not squares.sum().isfinite() and not squares.isfinite().all():  # the first is cheaper
        broken = ~norms.isfinite() if not norms.isfinite().all() else ~squares.isfinite().all(1)
        raise FloatingPointError(
            f"gram is not finite for the samples {broken.nonzero().flatten().tolist()}: "
            f"their gradients hold NaN or infinity, or their squares overflow {K.dtype}; "
            "leave them out, or pass gram.double() computed in float64"
        )
    return squares.clamp_(min=0).sqrt_()


def dbscan_noise(distances: Tensor, eps: float | Tensor, min_samples: int) -> Tensor:
    """The samples that DBSCAN labels -1: no core point, and none within ``eps``.

    (Ester et al. 1996.) As ``sklearn.cluster.DBSCAN(eps, min_samples=min_samples,
    metric="precomputed")``, which refuses ``eps=0``.
    """
    near = (distances <= eps).to(torch.float32)  # counts below 2^24 are exact, sums of it quick
    core = near.sum(dim=1) >= min_samples
    within_reach = core.to(near.dtype) @ near > 0
    return ~(core | within_reach)


def auto_eps(distances: Tensor, min_samples: int, quantile: float = 0.95) -> Tensor:
    """A radius for DBSCAN that removes at most the share ``1 - quantile`` of a batch, 0-dim.

    The least within which the share ``quantile`` has ``min_samples`` - 1 others: core points, then.
    (Interpolated quantiles give no such bound.) Infinity where B < ``min_samples``.
    """
    size = len(distances)
    if size < min_samples:
        return distances.new_tensor(math.inf)
    # kthvalue has no deterministic form on CUDA.
    nearest = distances.topk(min_samples, dim=1, largest=False).values
    reach = nearest.amax(dim=1).sort().values
    kept = math.ceil(quantile * size * (1 - 1e-12))  # an exact product is not rounded up
    return reach[kept - 1]


def outliers_in(
    gram: Tensor, outliers: OutlierFilter, present: Tensor | None = None, *, finite: bool = False
) -> Tensor:
    """What a filter removes; nobody where it removed all, or G is not ``finite``."""
    if present is not None:  # the others, without a gradient, would look like a dense crowd
        removed = torch.zeros_like(present)
        removed[present] = outliers_in(gram[present][:, present], outliers, finite=finite)
        return removed
    size = len(gram)
    # A look waits for the device.
    if not finite and not gram.sum().isfinite() and not gram.isfinite().all():
        return torch.zeros(size, dtype=torch.bool, device=gram.device)
    removed = returned(outliers(gram), size, mask=True)
    return (removed & ~removed.all()).to(gram.device)


def returned(found: object, size: int, *, mask: bool = False) -> Tensor:
    """What a filter (a ``mask``) or a rule returned, or an error."""
    whose = "the outlier filter" if mask else "weighting"
    what = "a bool mask, True for the samples to remove" if mask else "scores"
    expected = f"expected {what}, of shape ({size},)"
    if not isinstance(found, Tensor) or (found.dtype == torch.bool) is not mask:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{whose} returned {kind}: {expected}")
    if found.shape != (size,):
        raise ValueError(f"{whose} returned shape {tuple(found.shape)}: {expected}")
    return found
