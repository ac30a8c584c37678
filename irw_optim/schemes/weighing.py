"""The local scheme on one batch of all samples of a data set, which is never at hand at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.rescaling import gram_in_range, unscaled
from irw_optim.schemes.batch_losses import BatchLosses
from irw_optim.schemes.dataset_gradients import DatasetGradients, check_finite
from irw_optim.schemes.dataset_over_ranks import DatasetOverRanks
from irw_optim.schemes.eval_mode import eval_mode
from irw_optim.schemes.forward_mode import in_full_precision
from irw_optim.schemes.order import batches_to_check, check_order
from irw_optim.schemes.progress import progress_bar
from irw_optim.schemes.reading import DatasetReader
from irw_optim.schemes.requirements import check_block
from irw_optim.weighting import Alignment, worst_off_count
from irw_optim.weighting.local_scheme import LocalScheme, present_in
from irw_optim.weighting.outliers import OutlierFilter, outliers_in
from irw_optim.weighting.record import StepRecord


def weigh_dataset(
    reader: DatasetReader,
    losses_of: BatchLosses,
    model: nn.Module,
    engine: Engine,
    scored: Callable[[Tensor], bool],
    scheme: LocalScheme,
    *,
    outlier_block: int,
    progress: bool,
    ranks: Ranks | None = None,
) -> StepRecord:
    """What ``scheme`` decides for one batch of all the reader's samples; tensors of shape (N,).

    Over ``ranks``, each reads a part, and all have the record of one process.
    """
    outlier_block = check_block(outlier_block)
    size = reader.size
    if not size:
        raise ValueError("loader.dataset is empty: expected at least one sample")
    to_read = size * (1 + (scheme.outliers is not None) + scheme.needs_gradients)
    if scheme.needs_gradients:
        for_the_worst_off_alone = scheme.rule == Alignment(center=0.0)
        to_read += worst_off_count(size, scheme.alpha) if for_the_worst_off_alone else size
    if ranks is not None:
        to_read, progress = to_read // ranks.number, progress and ranks.rank == 0
    with (
        eval_mode(model),
        progress_bar("global weights", to_read, progress) as bar,
    ):
        alone = DatasetGradients(
            reader, torch.arange(size, device="cpu"), losses_of, engine, scored, bar
        )
        layout = [p for p in model.parameters() if p.requires_grad and scored(p)]
        rows = alone if ranks is None else DatasetOverRanks(alone, ranks, layout)
        everybody = rows.losses()
        check_finite(everybody.losses, "losses", rows.samples)
        if scheme.class_balance and everybody.labels is None:
            raise ValueError(
                "class_balance=True needs one class label a sample, and the criterion's target "
                "shows none: use a criterion whose target is a class, or set class_balance=False"
            )
        compared = layout if scheme.needs_gradients else None
        arranged = reader.collates or losses_of.forward is not None
        due = reader.check_is_due()
        if arranged and due:
            for asked in batches_to_check(alone, everybody.losses, reader.uses):
                check_order(alone, asked, compared)
        removed = None
        if scheme.outliers is not None:
            present = present_in(everybody)
            removed = outliers_in_blocks(alone, scheme.outliers, outlier_block, present, ranks)
            removed = removed.to(everybody.losses.device)
        record = scheme.decide(everybody, rows, removed)
        check_finite(record.scores, "scores", rows.samples)
        if due and (not scheme.needs_gradients or size <= reader.batch_size):
            alone.read_in_other_batches()
        differing = alone.consistency.differing_batches(in_full_precision(engine))
        if ranks is not None:  # what one raises, all have to
            differing = [batch for some in ranks.objects(differing) for batch in some]
        if differing:
            for batch in differing if arranged else []:
                check_order(alone, torch.tensor(batch, device="cpu"), compared)
            alone.consistency.warn(model)
        return record


def outliers_in_blocks(
    rows: DatasetGradients,
    outliers: OutlierFilter,
    block: int,
    present: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Tensor:
    """Ask the filter about blocks of samples, each compared with its block alone.

    The blocks are drawn at random (a data set sorted by class would otherwise give blocks of one
    class), once and for all, and of equal size up to one sample. Processes share the blocks out.

    Args:
        rows: of all N samples.
        outliers: the filter.
        block: samples in a block, at most.
        present: (N,) bool, those that are not ignored altogether; None for all.
        ranks: the processes.

    Returns:
        (N,) bool, True for the samples to remove; nobody of a block of which all would be.
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
        gram = unscaled(gram, factor)
        removed[positions] = outliers_in(gram, outliers).cpu()
    if ranks is not None:
        removed = torch.stack(ranks.objects(removed)).any(0)
    return removed
