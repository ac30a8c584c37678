"""Weights of a whole data set, in the memory of one batch and one gradient.

The local scheme on a single batch of all N samples, whose per-sample gradients are run again
whenever they are asked for::

    losses = G.losses()                          # pass 1: forward
    S      = worst_off(losses, alpha)
    g_S    = G.combine(S)                        # pass 2: over the members of S alone
    s      = G.dot(g_S)                          # pass 3: forward, and backward to the layers,
                                                 #         or the derivative along g_S forward
    w      = s.clamp(min=0) / s.clamp(min=0).sum()

In units where forward, gradients of outputs and gradients of weights cost 1 each, that is
1 + 3 alpha + 3, against 3 for an epoch of plain training.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from irw_optim.arguments import true_or_false
from irw_optim.criterion import validate_criterion
from irw_optim.distributed.replicas import replica_in
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.selection import ScoreParameters, select_parameters
from irw_optim.metrics._inputs import ArrayLike
from irw_optim.optimizer.options import described
from irw_optim.schemes.batch_losses import BatchLosses, Forward
from irw_optim.schemes.dataset_over_ranks import ranks_of
from irw_optim.schemes.reading import DatasetReader
from irw_optim.schemes.requirements import check_engine
from irw_optim.schemes.weighing import weigh_dataset
from irw_optim.schemes.within_classes import WithinClasses, class_codes
from irw_optim.weighting import Alignment
from irw_optim.weighting.local_scheme import LocalScheme
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.ranges import check_alpha, check_options
from irw_optim.weighting.record import StepRecord


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
    max(0, <g_i, g_S>). The samples are read three times (those outside of S twice), nearly in the
    order of the data set, with the model in eval mode: the weights depend, to rounding, neither on
    the loader's shuffling and sampler nor on the batch size, unless a sample's loss depends on who
    else is in its batch; that is logged as a warning. Mode, BatchNorm statistics, random
    states and ``p.grad`` are as before afterwards.

    Given a DistributedDataParallel, its processes share the reading out between them, and each
    gets all N weights, those of one process: a collective, which all of them call with the same
    data set. Given the module inside, a process makes the weights by itself.

    Args:
        model: gives the gradients; its parameters decide the device.
        criterion: as of `IRWOptimizer`; a `PerSampleLoss` makes one of a function.
        loader: over a map-style data set, with batches ``(inputs, target)`` as in
            ``criterion(model(inputs), target)``, or any that ``forward`` understands. Random
            augmentation in the data set differs from pass to pass: leave it out here.
        alpha: lower bound on the share of the smallest group, in (0, 1].
        outliers: filter in gradient space, for example `DBSCANFilter` (IRWO), in blocks.
        score_parameters: as of `IRWOptimizer`: whose gradients make the scores.
        progress: show a bar, in a notebook, or on a terminal if rich is installed.
        center: beta >= 0; above 0, pass 2 covers the whole data set.
        class_balance: give every class of the data set the same total weight.
        within_classes: make S, the scores and the weights in each class by itself, and give every
            class the same total weight: even weights in a class without a positive score. It
            costs no more. ``outliers`` still compares the samples of all classes.
        labels: (N,) classes for ``within_classes``, of any kind; None takes the criterion's target.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / N, or of each class alike.
        batch_size: samples at once; None takes the loader's. Twice as many where no graph is
            kept: for the losses, and where small batches are scored in forward mode.
        outlier_block: samples that ``outliers`` compares with each other, at most; drawn at random
            once, the same for every call with as many samples.
        forward: ``forward(model, batch)`` gives the criterion's arguments, for other batches.
        engine: as of `IRWOptimizer`.

    Returns:
        (N,) weights that sum to 1, on the model's device, in the order of the data set.

    Raises:
        TypeError: an argument of another type; an iterable data set.
        ValueError: an option outside its range, or a loader that does not fit.
        FloatingPointError: losses or scores that are not finite, with the samples' indices.
        ValueError: data sets of different lengths, or different options, in several processes.

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


def weigh_by(
    scheme: LocalScheme,
    model: nn.Module,
    criterion: nn.Module,
    reader: DatasetReader,
    score_parameters: ScoreParameters = None,
    progress: bool = True,
    outlier_block: int = 256,
    forward: Forward | None = None,
    engine: str = "auto",
) -> StepRecord:
    """What a scheme decides for all samples of a data set; arguments as of `global_weights`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module")
    validate_criterion(criterion)
    check_engine(engine)
    scored = select_parameters(model, score_parameters)
    options: dict[str, Any] = {"alpha": scheme.alpha, "mix": scheme.mix}
    options |= {"class_balance": scheme.class_balance, "outliers": described(scheme.outliers)}
    options |= {"within_classes": isinstance(scheme, WithinClasses), "rule": repr(scheme.rule)}
    options["outlier_block"] = outlier_block
    hooked = Engine(model, engine)
    try:
        return weigh_dataset(
            reader,
            BatchLosses(model, criterion, forward),
            model,
            hooked,
            scored.__contains__,
            scheme,
            outlier_block=outlier_block,
            progress=progress,
            ranks=ranks_of(replica_in(model), model, reader, options),
        )
    finally:
        hooked.remove_hooks()
