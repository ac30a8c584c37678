"""Weights of a whole data set, in the memory of one batch and one gradient.

The local scheme on a single batch of all N samples, whose gradients are run again when needed::

    losses = G.losses()                          # pass 1: forward
    S      = worst_off(losses, alpha)
    g_S    = G.combine(S)                        # pass 2: over the members of S alone
    s      = G.dot(g_S)                          # pass 3: forward, and backward to the layers,
                                                 #         or the derivative along g_S forward
    w      = s.clamp(min=0) / s.clamp(min=0).sum()

With forward, gradients of outputs and gradients of weights at 1 each, that is 1 + 3 alpha + 3,
against 3 for an epoch of plain training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from irw_optim.arguments import true_or_false
from irw_optim.gradients.selection import ScoreParameters
from irw_optim.metrics._inputs import ArrayLike
from irw_optim.schemes.batch_losses import Forward
from irw_optim.schemes.class_by_class import WithinClasses, class_codes
from irw_optim.schemes.reading import DatasetReader
from irw_optim.schemes.weighing import weigh_by
from irw_optim.weighting import Alignment
from irw_optim.weighting.local_scheme import LocalScheme
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.ranges import check_alpha, check_options


def global_weights(
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader[Any],
    alpha: float,
    outliers: OutlierFilter | None = None,
    score_parameters: ScoreParameters = None,
    progress: bool = True,
    *,
    center: float = 0.0,
    class_balance: bool = False,
    within_classes: bool = False,
    labels: ArrayLike | None = None,
    mix: float = 0.0,
    batch_size: int | None = None,
    outlier_block: int = 256,
    forward: Forward | None = None,
    engine: str = "auto",
) -> Tensor:
    """IRW weights of all N samples of a data set (arXiv 2411.03068, the global scheme).

    S is the worst-off alpha-fraction of the data set, and w_i is proportional to
    max(0, <g_i, g_S>). The samples are read two or three times, nearly in the order of the data
    set, with the model in eval mode: to rounding, the weights depend neither on the loader's
    sampler nor on the batch size. A sample's loss that depends on who else is in its batch is
    logged as a warning. Model, random states and ``p.grad`` are as before afterwards.

    The processes of a DistributedDataParallel all call this with the same data set, share the
    reading out between them, and get the weights of one process. Given the module inside, a process
    makes them by itself.

    Args:
        model: gives the gradients; its parameters decide the device.
        criterion: as of `IRWOptimizer`.
        loader: over a map-style data set, with batches ``(inputs, target)``, or any that
            ``forward`` understands, without random augmentation.
        alpha: lower bound on the share of the smallest group, in (0, 1].
        outliers: filter in gradient space, for example `DBSCANFilter` (IRWO), in blocks.
        score_parameters: as of `IRWOptimizer`: whose gradients make the scores.
        progress: show a bar, in a notebook, or on a terminal if rich is installed.
        center: beta >= 0; above 0, pass 2 covers the whole data set.
        class_balance: give every class of the data set the same total weight.
        within_classes: make S, the scores and the weights in each class by itself, and give every
            class the same total weight. ``outliers`` still compares the samples of all classes.
        labels: (N,) classes for ``within_classes``, of any kind; None takes the criterion's target.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / N, or of each class alike.
        batch_size: samples at once; None takes the loader's. Twice as many where no graph is kept.
        outlier_block: samples that ``outliers`` compares with each other, at most.
        forward: ``forward(model, batch)`` gives the criterion's arguments, for other batches.
        engine: as of `IRWOptimizer`.

    Returns:
        (N,) weights that sum to 1, on the model's device, in the order of the data set.

    Raises:
        TypeError: an argument of another type; an iterable data set.
        ValueError: an option outside its range, a loader that does not fit, or data sets or
            options that differ between processes.
        FloatingPointError: losses or scores that are not finite, with the samples' indices.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    >>> data = TensorDataset(torch.randn(40, 2), torch.randint(0, 2, (40,)))
    >>> shuffled = DataLoader(data, batch_size=8, shuffle=True)
    >>> weights = global_weights(model, criterion, shuffled, alpha=0.2)
    >>> weights.shape, round(float(weights.sum()), 4)
    (torch.Size([40]), 1.0)
    """
    within_classes = true_or_false("within_classes", within_classes)
    if labels is not None and not within_classes:
        raise ValueError("labels are given and within_classes=False: give within_classes=True")
    alpha = check_alpha(alpha)
    check_options(center=center, mix=mix)
    class_balance = true_or_false("class_balance", class_balance)
    reader = DatasetReader(loader, batch_size)
    rule, mix = Alignment(float(center)), float(mix)
    scheme = LocalScheme(alpha, rule, outliers, class_balance, mix)
    if within_classes:
        codes = class_codes(labels, reader.size)
        scheme = WithinClasses(alpha, rule, outliers, mix=mix, given=codes)
    return weigh_by(
        scheme, model, criterion, reader, score_parameters, progress, outlier_block, forward, engine
    ).weights
