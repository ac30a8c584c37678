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

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from irw_optim.criterion import PerSampleLosses, per_sample_losses, validate_criterion
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.replicas import replica_in
from irw_optim.distributed.shard_checks import check_whole
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.rescaling import gram_in_range, unscaled
from irw_optim.gradients.selection import ScoreParameters, select_parameters
from irw_optim.optimizer.options import described
from irw_optim.schemes.dataset_gradients import DatasetGradients, check_finite
from irw_optim.schemes.dataset_over_ranks import DatasetOverRanks, ranks_of
from irw_optim.schemes.eval_mode import eval_mode
from irw_optim.schemes.forward_mode import in_full_precision
from irw_optim.schemes.order import batches_to_check, check_order
from irw_optim.schemes.progress import progress_bar
from irw_optim.schemes.reading import DatasetReader
from irw_optim.schemes.requirements import check_block, check_engine
from irw_optim.weighting import Alignment, worst_off_count
from irw_optim.weighting.local_scheme import LocalScheme, present_in
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.ranges import check_alpha, check_options
from irw_optim.weighting.record import StepRecord
from irw_optim.weighting.weights import outliers_in

Forward = Callable[[nn.Module, Any], tuple[Any, ...]]
"""``forward(model, batch)`` gives the arguments of the criterion, ``(model(x), y)`` as a rule."""


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
        progress: show a bar on a terminal, if rich is installed.
        center: beta >= 0; above 0, pass 2 covers the whole data set.
        class_balance: give every class of the data set the same total weight.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / N.
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

    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    >>> data = TensorDataset(torch.randn(40, 2), torch.randint(0, 2, (40,)))
    >>> shuffled = DataLoader(data, batch_size=8, shuffle=True)
    >>> weights = global_weights(model, criterion, shuffled, alpha=0.2)
    >>> weights.shape, round(float(weights.sum()), 4)
    (torch.Size([40]), 1.0)
    """
    alpha = check_alpha(alpha)
    check_options(center=center, mix=mix)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a torch.nn.Module")
    validate_criterion(criterion)
    check_engine(engine)
    reader = DatasetReader(loader, batch_size)
    scored = select_parameters(model, score_parameters)
    options: dict[str, Any] = {"alpha": alpha, "center": center, "mix": mix}
    options |= {"class_balance": class_balance, "outliers": described(outliers)}
    options["outlier_block"] = outlier_block
    hooked = Engine(model, engine)
    try:
        return weigh_dataset(
            reader,
            BatchLosses(model, criterion, forward),
            model,
            hooked,
            scored.__contains__,
            LocalScheme(alpha, Alignment(center), outliers, class_balance, mix),
            outlier_block=outlier_block,
            progress=progress,
            ranks=ranks_of(replica_in(model), model, reader, options),
        ).weights
    finally:
        hooked.remove_hooks()


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
        alone = DatasetGradients(reader, torch.arange(size), losses_of, engine, scored, bar)
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
                check_order(alone, torch.tensor(batch), compared)
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
    order = torch.randperm(rows.batch_size, generator=torch.Generator().manual_seed(0))
    if present is not None:
        order = order[present.cpu()[order]]
    pieces = order.tensor_split(math.ceil(len(order) / block))
    if ranks is not None:
        pieces = pieces[ranks.rank :: ranks.number]
    removed = torch.zeros(rows.batch_size, dtype=torch.bool)
    own, sizes = torch.cat([order[:0], *pieces]), [len(piece) for piece in pieces]
    for positions, gradients in rows.blocks(own, sizes):
        gram = unscaled(*gram_in_range(gradients))
        removed[positions] = outliers_in(gram, outliers).cpu()
    if ranks is not None:
        removed = torch.stack(ranks.objects(removed)).any(0)
    return removed


class BatchLosses:
    """The per-sample losses of a batch as the loader yields it.

    An object and no closure: its copy is about the copy of the model.

    Args:
        model: run on the batch; its parameters decide the device.
        criterion: makes the losses.
        forward: of a batch that is no pair of inputs and target.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, forward: Forward | None) -> None:
        check_whole(model, "a weight for every sample of a data set")
        self.model = model
        self.criterion = criterion
        self.forward = forward

    def __call__(self, batch: Any) -> PerSampleLosses:
        """The losses, with their graph where gradients are enabled."""
        model, arguments = self.model, self.forward or _inputs_and_target
        if isinstance(model, DistributedDataParallel):
            model = model.module  # its own forward would wait for a backward pass of every process
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return per_sample_losses(self.criterion, *arguments(model, _on(device, batch)))


def _on(device: torch.device, batch: Any) -> Any:
    """The batch with all that has a ``to``, in tuples, lists and mappings too, on the device."""
    return tree_map(
        lambda value: value.to(device) if hasattr(value, "to") else value,
        batch,
        is_leaf=lambda value: hasattr(value, "to"),
    )


def _inputs_and_target(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        shape = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise TypeError(
            f"the loader's batches are no pairs (inputs, target) but a {shape}: give "
            'forward=lambda model, batch: (model(batch["x"]), batch["y"]), which returns the '
            "criterion's arguments"
        )
    inputs, target = batch
    return model(inputs), target
