"""What an outlier filter says of one batch, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from irw_optim.weighting.outliers import OutlierFilter


def outliers_in(
    gram: Tensor,
    outliers: OutlierFilter,
    present: Tensor | None = None,
    *,
    finite: bool = False,
) -> Tensor:
    """What the filter removes; nobody where it removed everybody or where G is not finite.

    Scores of what is not finite are not finite either, and whoever steps on them decides.
    """
    if present is not None:  # the others have no gradient, and would look like a dense crowd
        removed = torch.zeros_like(present)
        removed[present] = outliers_in(gram[present][:, present], outliers, finite=finite)
        return removed
    nobody = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    looks = not finite  # at a number of the Gram matrix: which would wait for a device
    if looks and not gram.sum().isfinite() and not gram.isfinite().all():  # the first is cheaper
        return nobody
    removed = outliers(gram)
    if not isinstance(removed, Tensor) or removed.dtype != torch.bool:
        found = removed.dtype if isinstance(removed, Tensor) else type(removed).__name__
        raise TypeError(
            f"the outlier filter returned {found}: expected a bool mask of shape ({len(gram)},), "
            "True for the samples to remove"
        )
    if removed.shape != nobody.shape:
        raise ValueError(
            f"the outlier filter returned shape {tuple(removed.shape)}: expected a bool mask of "
            f"shape ({len(gram)},), True for the samples to remove"
        )
    return removed & ~removed.all()
