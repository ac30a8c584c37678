"""One step of an optimizer as a row: everything here runs on recorded steps alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from irw_optim.metrics._inputs import GroupsLike, as_columns
from irw_optim.monitor.held import agreement, held_members
from irw_optim.monitor.rows import Array, Batch, Row, by_class, by_group, read, summarise
from irw_optim.optimizer import IRWOptimizer
from irw_optim.record import StepRecord


def row_of(
    optimizer: IRWOptimizer,
    record: StepRecord,
    held_for: int | None,
    passes: Sequence[GroupsLike],
) -> Row | None:
    """The row of the step that the optimizer just took; None where nobody has a target.

    Args:
        optimizer: it knows alpha, the warm-up, and what a global scheme holds.
        record: its `last_step`, of B >= 1 samples.
        held_for: steps since the weights were made; None for a local scheme.
        passes: the groups that were given for each backward pass, oldest first.

    Raises:
        ValueError: the groups are not those of this batch.
    """
    groups = groups_of(passes, len(record.losses)) if passes else None
    batch = read(record, gradient_norm(optimizer))
    held = held_members(optimizer.scheme)
    counted = with_a_target(batch, getattr(optimizer.criterion, "ignore_index", None))
    if counted is not None:
        batch = batch.part(counted)
        held = None if held is None else held[counted]
        groups = None if groups is None else {k: g[counted] for k, g in groups.items()}
    if not len(batch.losses):
        return None
    unknown = float("nan")
    numbers = {
        "weighted": float(optimizer.steps > optimizer.warmup_steps),
        **summarise(batch, float(optimizer.own_state()["alpha"])),
        "held_for": unknown if held_for is None else float(held_for),
        "resampled": float(getattr(optimizer.scheme, "resampled", False)),
        "held_agreement": unknown if held is None else agreement(batch.losses, held),
    }
    classes = by_class(batch)
    breakdowns = {} if classes is None else {"class": classes}
    if groups is not None:
        breakdowns["group"] = by_group(batch, groups)
    return Row(optimizer.steps, numbers, breakdowns)


def groups_of(passes: Sequence[GroupsLike], size: int) -> dict[str, Array]:
    """The groups of the newest backward passes that have ``size`` samples together, by column.

    >>> groups_of([["old"], ["a"], ["b", "b"]], size=3)["group"].tolist()
    ['a', 'b', 'b']
    """
    given = [as_columns(groups) for groups in passes]
    lengths = [len(next(iter(columns.values()))) for columns in given]
    first = len(given)
    while first and sum(lengths[first:]) < size:
        first -= 1
    if sum(lengths[first:]) != size:
        raise ValueError(
            f"the step was on a batch of {size} samples, but monitor.groups() was given "
            f"{' + '.join(map(str, lengths))}: expected one label for each sample of the batch, in "
            "one call for each backward pass"
        )
    return {name: np.concatenate([columns[name] for columns in given[first:]]) for name in given[0]}


def with_a_target(batch: Batch, ignored: int | None) -> Array | None:
    """(B,) bool, False for targets that the criterion ignores, which are nobody's; None for all."""
    if batch.labels is None or ignored is None:
        return None
    counted = np.asarray(batch.labels != ignored)
    return None if counted.all() else counted


def gradient_norm(optimizer: IRWOptimizer) -> Tensor:
    """The norm of ``p.grad`` as the step left it, 0-dim."""
    gradients = [
        p.grad.coalesce().values() if p.grad.is_sparse else p.grad
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    return get_total_norm(gradients) if gradients else torch.zeros(())
