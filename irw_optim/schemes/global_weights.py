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

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

from irw_optim.arguments import true_or_false, whole_number
from irw_optim.criterion import validate_criterion
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.replicas import replica_in
from irw_optim.gradients.engine import ENGINES, Engine
from irw_optim.gradients.rescaling import gram_in_range, unscaled
from irw_optim.gradients.selection import ScoreParameters, select_parameters
from irw_optim.metrics._groups import ArrayLike
from irw_optim.notebook import progress_bar
from irw_optim.optimizer.options import described
from irw_optim.schemes.batch_losses import (
    BatchLosses,
    Forward,
    eval_mode,
    in_full_precision,
    inputs_and_target,
)
from irw_optim.schemes.dataset_gradients import DatasetGradients, DatasetOverRanks
from irw_optim.schemes.deciding import WithinClasses, class_codes
from irw_optim.schemes.order import batches_to_check, check_order
from irw_optim.schemes.reading import DatasetReader
from irw_optim.weighting import Alignment, worst_off_count
from irw_optim.weighting.local_scheme import LocalScheme, present_in
from irw_optim.weighting.outliers import OutlierFilter, outliers_in
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
    max(0, <g_i, g_S>). The samples are read two or three times, nearly in the order of the data
    set, with the model in eval mode: to rounding, the weights depend neither on the loader's
    sampler nor on the batch size. A sample's loss that depends on who else is in its batch is
    logged as a warning. Model, random states and ``p.grad`` are as before afterwards.

    The processes of a DistributedDataParallel, with the same data set each, share the reading out
    and get the weights of one process. Given the module inside, a process makes them by itself.

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
    """`weigh_dataset` by a model in no training."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module")
    validate_criterion(criterion)
    allowed = [kind for kind in ENGINES if kind != "grad_sample"]
    if engine not in allowed:
        why = ", which reads what a training loop left in p.grad_sample"
        why = why if engine == "grad_sample" else ""
        raise ValueError(f"engine={engine!r}{why}: expected one of {', '.join(map(repr, allowed))}")
    scored = select_parameters(model, score_parameters)
    told = {"within_classes": type(scheme) is not LocalScheme}
    told |= {name: described(value) for name, value in vars(scheme).items()}
    hooked = Engine(model, engine)
    try:
        losses_of, block = BatchLosses(model, criterion, forward), check_block(outlier_block)
        of = reader, losses_of, hooked, scored, scheme
        return weigh_dataset(*of, block, progress, replica_in(model), told)
    finally:
        hooked.remove_hooks()


def check_block(outlier_block: object) -> int:
    """The whole number of samples that ``outlier_block`` is, or an error."""
    expected = "the number of samples that the filter compares with each other, for example 256"
    return whole_number("outlier_block", outlier_block, 1, expected)


def weigh_dataset(
    reader: DatasetReader,
    losses_of: BatchLosses,
    engine: Engine,
    scored: Container[Tensor],
    scheme: LocalScheme,
    outlier_block: int,
    progress: bool,
    replica: DistributedDataParallel | None,
    equal_on_ranks: dict[str, Any],
) -> StepRecord:
    """What ``scheme`` decides for one batch of all the reader's samples; tensors of shape (N,).

    The processes of ``replica`` read a part each, and all have the record of one process.
    """
    model, size = losses_of.model, reader.size
    if not size:
        raise ValueError("loader.dataset is empty: expected at least one sample")
    ranks = None
    # A DDP called inside of the model may broadcast buffers in every forward pass, and so all of
    # its processes have to run as many.
    if replica is not None and not any(child is replica for child in list(model.modules())[1:]):
        alike = {"the number of samples in the data set": size, "outlier_block": outlier_block}
        ranks = Ranks(replica.process_group, alike | equal_on_ranks)
    to_read = size * (1 + (scheme.outliers is not None) + scheme.needs_gradients)
    if scheme.needs_gradients:
        for_the_worst_off_alone = scheme.rule == Alignment(center=0.0)
        to_read += worst_off_count(size, scheme.alpha) if for_the_worst_off_alone else size
    if ranks is not None:
        to_read, progress = to_read // ranks.number, progress and ranks.rank == 0
    with eval_mode(model), progress_bar("global weights", to_read, progress) as bar:
        layout = [p for p in model.parameters() if p.requires_grad and p in scored]
        parts = reader, losses_of, engine, scored.__contains__, bar
        rows = (
            DatasetGradients(*parts) if ranks is None else DatasetOverRanks(ranks, layout, *parts)
        )
        everybody = rows.losses()
        _check_finite(everybody.losses, "losses")
        compared = layout if scheme.needs_gradients else None
        by_torch = reader.loader.collate_fn is default_collate
        arranged = not by_torch or losses_of.forward is not inputs_and_target
        due = reader.check_is_due()
        if arranged and due:
            for asked in batches_to_check(rows, everybody.losses, reader.uses):
                check_order(rows, asked, compared)
        removed = None
        if scheme.outliers is not None:
            present = present_in(everybody)
            removed = _outliers_in_blocks(rows, scheme.outliers, outlier_block, present, ranks)
            removed = removed.to(everybody.losses.device)
        record = scheme.decide(everybody, rows, removed)
        _check_finite(record.scores, "scores")
        if due and (not scheme.needs_gradients or size <= reader.batch_size):
            rows.read_in_other_batches()
        differing = rows.consistency.differing_batches(in_full_precision(engine))
        if ranks is not None:  # what one raises, all have to
            differing = [batch for some in ranks.objects(differing) for batch in some]
        if differing:
            for batch in differing if arranged else []:
                check_order(rows, torch.tensor(batch, device="cpu"), compared)
            rows.consistency.warn(model)
        return record


def _outliers_in_blocks(
    rows: DatasetGradients,
    outliers: OutlierFilter,
    block: int,
    present: Tensor | None,
    ranks: Ranks | None,
) -> Tensor:
    """Whom the filter removes of all N samples, (N,) bool, each compared with its block alone.

    The blocks are drawn at random (those of a sorted data set would have one class each), once and
    for all. Processes share them out. Nobody is removed of a block of which all would be.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.randperm(rows.batch_size, generator=generator, device="cpu")
    if present is not None:
        order = order[present.cpu()[order]]
    pieces = order.tensor_split(math.ceil(len(order) / block))
    if ranks is not None:
        pieces = pieces[ranks.rank :: ranks.number]
    removed = torch.zeros(rows.batch_size, dtype=torch.bool, device="cpu")
    own, sizes = torch.cat([order[:0], *pieces]), [len(piece) for piece in pieces]
    for positions, gradients in rows.blocks(own, sizes):
        gram, factor, _, _ = gram_in_range(gradients)
        removed[positions] = outliers_in(unscaled(gram, factor), outliers).cpu()
    if ranks is not None:
        removed = torch.stack(ranks.objects(removed)).any(0)
    return removed


def _check_finite(values: Tensor, what: str) -> None:
    broken = (~values.isfinite()).nonzero().flatten().tolist()
    if broken:
        named = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        raise FloatingPointError(
            f"the {what} of {len(broken)} samples are not finite (dataset indices {named}): "
            "no weights were made; look at these samples, or at the model's parameters"
        )
