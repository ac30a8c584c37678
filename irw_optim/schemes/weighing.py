"""The weights of a whole data set, made and held.

They are those of the local scheme on a single batch of all N samples, of which pass 1 has losses,
2 sums up g_S over the members of S alone, and 3 pushes it forwards through each batch's graph, or
goes back to the layers. It takes the memory of one batch and one gradient.
"""

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from irw_optim.arguments import check_state, one_of, whole_number
from irw_optim.criterion import PerSampleLosses, validate_criterion
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.replicas import replica_in
from irw_optim.gradients.engine import ENGINES, Engine
from irw_optim.gradients.magnitudes import gram_in_range, unscaled
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.notebook import progress_bar
from irw_optim.optimizer.irw_optimizer import ScoreParameters, select_parameters
from irw_optim.optimizer.options import described
from irw_optim.weighting import (
    Alignment,
    Averaging,
    LocalScheme,
    StepRecord,
    normalise,
    present_of,
    refuse_broken,
    worst_off_count,
)
from irw_optim.weighting.outliers import OutlierFilter, outliers_in

from .batch_losses import BatchLosses, Forward, eval_mode, in_full_precision, inputs_and_target
from .dataset_gradients import DatasetGradients, DatasetOverRanks
from .order import batches_to_check, check_order
from .reading import DatasetReader
from .resampling import check_sample_weights


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
    # The other reads what a training loop left in p.grad_sample.
    one_of("engine", engine, [kind for kind in ENGINES if kind != "grad_sample"])
    scored = select_parameters(model, score_parameters)
    told = {"within_classes": type(scheme) is not LocalScheme}
    told |= {name: described(value) for name, value in vars(scheme).items()}
    hooked = Engine(model, engine)
    try:
        losses_of, replica = BatchLosses(model, criterion, forward), replica_in(model)
        block = whole_number("outlier_block", outlier_block, 1)
        return weigh_dataset(
            reader, losses_of, hooked, scored, scheme, block, progress, replica, told
        )
    finally:
        hooked.remove_hooks()


@torch.inference_mode(False)  # gradients, also where it is called without
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
    """What ``scheme`` decides for all samples, (N,), on each process of ``replica``."""
    model, size = losses_of.model, reader.size
    if not size:
        raise ValueError("loader.dataset is empty: expected at least one sample")
    ranks = None
    # A DDP inside of the model may broadcast buffers: all have to run as many batches.
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
        rows = DatasetGradients(*parts)
        if ranks is not None:
            rows = DatasetOverRanks(*parts, ranks, layout)
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
            present = present_of(everybody.counts)
            removed = _outliers_in_blocks(rows, scheme.outliers, outlier_block, present, ranks)
            removed = removed.to(everybody.losses.device)
        record = scheme.decide(everybody, rows, removed)
        _check_finite(record.scores, "scores")
        if due and (not scheme.needs_gradients or size <= reader.batch_size):
            rows.read_in_other_batches()
        differing = rows.consistency.differing_batches(in_full_precision(model))
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
    """Whom the filter removes, (N,) bool, in random blocks: sorted ones might have one class."""
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
        gram, factor, _ = gram_in_range(gradients)
        removed[positions] = outliers_in(unscaled(gram, factor), outliers).cpu()
    if ranks is not None:
        removed = torch.stack(ranks.objects(removed)).any(0)
    return removed


def _check_finite(values: Tensor, what: str) -> None:
    broken = (~values.isfinite()).nonzero().flatten().tolist()
    refuse_broken(what, "dataset", broken, "look at these, or at the model's parameters")


def record_of(saved: Any, size: int, device: torch.device) -> StepRecord | None:
    """What a state holds of a renewal."""
    if saved is None:
        return None
    check_state("record", saved, "weights")
    check_sample_weights(saved["weights"], size)
    moved: dict[str, Any] = {n: t if t is None else t.to(device) for n, t in saved.items()}
    for name, t in moved.items():
        if t is not None and t.ndim and len(t) != size:
            raise ValueError(f"record[{name!r}] has {len(t)} entries: expected {size}")
    return StepRecord(**moved)


@dataclass(eq=False)
class HeldWeights:
    """A scheme: held weights; plain steps if ``resampled``."""

    needs_gradients = False

    resampled: bool
    record: StepRecord | None = None
    indices: Tensor | None = None
    unused = False  # the batch drawn last

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients | None = None) -> StepRecord:
        """Those of the batch's samples, renormalised; uniform where nobody has any."""
        if self.resampled:
            return Averaging().decide(batch, rows)
        losses = batch.losses.detach()
        indices, record = self._selected(len(losses)), self.record
        assert record is not None  # or it would have been said
        held, present = record.weights[indices].to(losses.device), present_of(batch.counts)
        held = held if present is None else held * present
        weights, fallback = normalise(held, present)
        worst_off, outliers, scores = (
            of_all[indices] for of_all in (record.worst_off, record.outliers, record.scores)
        )
        decided = worst_off, outliers, scores, weights, fallback
        return StepRecord(*decided, losses=losses, labels=batch.labels, counts=batch.counts)

    def over_ranks(self, ranks: Ranks) -> "HeldWeights":
        """For the batch of all processes: an all-gather of B indices."""
        if self.resampled:
            return self
        size = ranks.sizes[ranks.rank]
        failure: Exception | None = None
        try:
            told = self._selected(size)
        except (RuntimeError, ValueError, IndexError) as error:
            if self.record is None:  # nowhere, then: nobody waits
                raise
            # The others wait for indices, and are told by impossible ones.
            told, failure = torch.full((size,), -1, device=self.record.weights.device), error
        everybody = ranks.gather(told)
        if failure is not None:
            raise failure
        if bool((everybody < 0).any()):
            raise RuntimeError("another process does not know its samples: its error says more")
        return replace(self, indices=everybody)

    def __copy__(self) -> "HeldWeights":
        return replace(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "indices": None}

    def _selected(self, size: int) -> Tensor:
        record, indices, self.unused = self.record, self.indices, False
        if indices is None and not size:  # a process without samples
            indices = torch.empty(0)
        if record is None or indices is None:
            raise RuntimeError(
                "the global scheme does not know which samples this batch holds: iterate over it, "
                "for batch in scheme, or call scheme.select(indices) before the criterion"
            )
        if len(indices) != size:
            raise ValueError(
                f"the batch has {size} losses but {len(indices)} indices were selected: "
                "expected the batch that the scheme yielded last"
            )
        known = len(record.weights)
        if size and not 0 <= int(indices.min()) <= int(indices.max()) < known:
            raise IndexError(
                f"the batch has the indices {int(indices.min())} to {int(indices.max())}, but the "
                f"weights are those of {known} samples: they are stale or belong to another data "
                "set; call scheme.renew()"
            )
        return indices.to(record.weights.device, torch.int64)
