"""The local scheme on one batch of all samples of a data set, which is never at hand at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.arguments import whole_number
from irw_optim.criterion import validate_criterion
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.replicas import replica_in
from irw_optim.gradients.engine import ENGINES, Engine
from irw_optim.gradients.rescaling import gram_in_range, unscaled
from irw_optim.gradients.selection import ScoreParameters, select_parameters
from irw_optim.optimizer.options import described
from irw_optim.schemes.batch_losses import BatchLosses, Forward, eval_mode
from irw_optim.schemes.dataset_gradients import DatasetGradients, DatasetOverRanks
from irw_optim.schemes.forward_mode import in_full_precision
from irw_optim.schemes.order import batches_to_check, check_order
from irw_optim.schemes.progress import progress_bar
from irw_optim.schemes.reading import DatasetReader
from irw_optim.weighting import Alignment, worst_off_count
from irw_optim.weighting.local_scheme import LocalScheme, present_in
from irw_optim.weighting.outliers import OutlierFilter, outliers_in
from irw_optim.weighting.record import StepRecord


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
    """`weigh_dataset` by a model in no training; arguments as of `global_weights`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module")
    validate_criterion(criterion)
    allowed = [kind for kind in ENGINES if kind != "grad_sample"]
    if engine not in allowed:
        why = ""
        if engine == "grad_sample":
            why = ", which reads what a backward pass of the training loop left in p.grad_sample"
        raise ValueError(f"engine={engine!r}{why}: expected one of {', '.join(map(repr, allowed))}")
    scored = select_parameters(model, score_parameters)
    hooked = Engine(model, engine)
    try:
        return weigh_dataset(
            reader,
            BatchLosses(model, criterion, forward),
            hooked,
            scored.__contains__,
            scheme,
            outlier_block=check_block(outlier_block),
            progress=progress,
            replica=replica_in(model),
            equal_on_ranks={
                "within_classes": type(scheme) is not LocalScheme,
                **{name: described(value) for name, value in vars(scheme).items()},
            },
        )
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
    scored: Callable[[Tensor], bool],
    scheme: LocalScheme,
    *,
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
        layout = [p for p in model.parameters() if p.requires_grad and scored(p)]
        parts = reader, losses_of, engine, scored, bar
        rows = DatasetGradients(*parts)
        if ranks is not None:
            rows = DatasetOverRanks(ranks, layout, *parts)
        everybody = rows.losses()
        _check_finite(everybody.losses, "losses")
        if scheme.class_balance and everybody.labels is None:
            raise ValueError(
                "class_balance=True needs one class label a sample, and the criterion's target "
                "shows none: use a criterion whose target is a class, or set class_balance=False"
            )
        compared = layout if scheme.needs_gradients else None
        arranged = reader.collates or losses_of.forward is not None
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
    order = torch.randperm(
        rows.batch_size, generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    )
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
