"""GlobalScheme: renews the weights of the data set as the training goes on, and hands them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from irw_optim.optimizer import IRWOptimizer
from irw_optim.processes import place
from irw_optim.schemes.batch_losses import BatchLosses, Forward
from irw_optim.schemes.dataset_over_ranks import ranks_of
from irw_optim.schemes.held_weights import HeldWeights, check_sample_weights
from irw_optim.schemes.reading import DatasetReader, indexed_loader
from irw_optim.schemes.requirements import (
    USES,
    check_block,
    check_choices,
    local_scheme_of,
    model_and_criterion_of,
)
from irw_optim.schemes.resampling import ResamplingSampler
from irw_optim.schemes.resuming import ResumableLoader
from irw_optim.schemes.weighing import weigh_dataset
from irw_optim.weighting.local_scheme import LocalScheme
from irw_optim.weighting.record import StepRecord


class GlobalScheme:
    """Trains with weights of the whole data set, renewed every ``refresh`` epochs or steps.

    The loop iterates over the scheme in place of its loader, and stays as it was otherwise::

        optimizer = IRWOptimizer(SGD(...), alpha=0.2, model=model, criterion=criterion)
        scheme = GlobalScheme(optimizer, loader, refresh=50, unit="steps")
        for epoch in range(epochs):
            for x, y in scheme:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()

    All options of the optimizer hold for the data set: alpha, ``center``, ``class_balance``,
    ``mix``, ``outliers``, ``weighting``, ``score_parameters``, and ``warmup_steps`` of plain
    averaging before the first weights are made. One renewal costs about one and a half epochs
    of plain training (`irw_optim.schemes.global_weights`).

    With the model in DistributedDataParallel, the processes share a renewal out between them, and
    their steps are those of one process on all their batches. Each gives the same data set.

    Args:
        optimizer: its local scheme is replaced until `detach`.
        loader: a plain DataLoader over a map-style data set.
        refresh: how long weights are held, in ``unit``. Held for long, weights settle on one class
            and flip from renewal to renewal; see ``docs/schemes.md`` for what that costs.
        unit: ``"epochs"`` (of the loader's length, in batches) or ``"steps"`` of the optimizer.
        use: ``"reweighting"``: batches as the loader draws them, each sample counted by its
            weight, renormalised in the batch. ``"resampling"``: batches drawn with replacement in
            proportion to the weights, and plain steps; the loader's sampler is not used then.
        criterion: None takes the optimizer's.
        forward: as of `irw_optim.schemes.global_weights`, for batches that are no pairs.
        batch_size: as there, for the renewals.
        outlier_block: as there.
        progress: as there.
        seed: of the draws, with ``use="resampling"``; the same in all processes.

    Raises:
        DPGuaranteeError: a differentially private optimizer.
        TypeError, ValueError: an argument that is impossible, named with what is allowed.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    >>> data = TensorDataset(torch.randn(40, 2), torch.randint(0, 2, (40,)))
    >>> optimizer = IRWOptimizer(
    ...     torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model, criterion=criterion
    ... )
    >>> scheme = GlobalScheme(optimizer, DataLoader(data, batch_size=8, shuffle=True))
    >>> for x, y in scheme:
    ...     optimizer.zero_grad()
    ...     criterion(model(x), y).backward()
    ...     optimizer.step()
    >>> int(scheme.record.worst_off.sum()), round(float(optimizer.last_step.weights.sum()), 4)
    (8, 1.0)
    """

    def __init__(
        self,
        optimizer: IRWOptimizer,
        loader: DataLoader[Any],
        *,
        refresh: int = 1,
        unit: str = "epochs",
        use: str = "reweighting",
        criterion: nn.Module | None = None,
        forward: Forward | None = None,
        batch_size: int | None = None,
        outlier_block: int = 256,
        progress: bool = False,
        seed: int = 0,
    ) -> None:
        local_scheme_of(optimizer)
        refresh = check_choices(refresh, unit, use)
        outlier_block = check_block(outlier_block)
        self._model, criterion = model_and_criterion_of(optimizer, criterion)
        self.optimizer = optimizer
        self.refresh = refresh
        self.unit = unit
        self.outlier_block = outlier_block
        self.progress = progress
        self._reader = DatasetReader(loader, batch_size)
        self._losses_of = BatchLosses(self._model, criterion, forward)
        self._sampler: ResamplingSampler | None = None
        share = _rank_and_world_size(loader)
        if use == "resampling":
            self._sampler = _uniform_sampler(self._reader.size, seed, share)
        self._equal_on_ranks = {"refresh": refresh, "unit": unit, "use": use, "seed": seed}
        self._equal_on_ranks["outlier_block"] = outlier_block
        # Renewed before a batch is drawn: resampling draws it by the weights.
        self.loader = ResumableLoader(
            indexed_loader(loader, self._sampler), self._renew_if_due, share
        )
        self._held = HeldWeights(resampled=self._sampler is not None)
        self._batches = 0
        self._renewed_at = 0
        optimizer.scheme = self._held
        finalize(self, _restore_local_scheme, ref(optimizer), self._held).atexit = False

    @property
    def _local(self) -> LocalScheme:
        return self.optimizer.local_scheme

    @property
    def record(self) -> StepRecord | None:
        """What the last renewal decided, tensors of shape (N,); None before the first one."""
        return self._held.record

    @property
    def weights(self) -> Tensor | None:
        """The weights held, (N,), sum 1; None before the first renewal."""
        return None if self.record is None else self.record.weights

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for indices, batch in self.loader:
            self._take(indices)
            yield batch
        self._held.indices = None  # a batch of the same size from elsewhere is another one

    def select(self, indices: Tensor) -> None:
        """Say which samples the next batch holds, for loops with a loader of their own.

        ``for indices, (x, y) in loader`` over an `IndexedDataset`, with this call first. Renews
        the weights where that is due.

        Args:
            indices: (B,) int64, of the data set.

        Raises:
            RuntimeError: the scheme draws the batches itself.
        """
        if self._sampler is not None:
            raise RuntimeError(
                'use="resampling" draws the batches itself: iterate over the scheme, or give '
                'use="reweighting"'
            )
        self._renew_if_due()
        self._take(indices)

    def renew(self) -> StepRecord:
        """Make new weights now, with the model as it is.

        Raises:
            ValueError: the data set has another length than it had, and batches are resampled.
        """
        if self._sampler is not None and self._reader.size != len(self._sampler.weights):
            raise ValueError(
                f"the data set has {self._reader.size} samples, and had "
                f"{len(self._sampler.weights)} when the draws were set up: "
                'make a new GlobalScheme(..., use="resampling")'
            )
        chosen, processes = self.optimizer.scored_parameters(), self.optimizer.processes
        replica = None if processes is None else processes.find()
        self._held.record = weigh_dataset(
            self._reader,
            self._losses_of,
            self._model,
            self.optimizer.engine,
            chosen.__contains__,
            self._local,
            outlier_block=self.outlier_block,
            progress=self.progress,
            ranks=ranks_of(replica, self._model, self._reader, self._equal_on_ranks),
        )
        self._renewed_at = self._now()
        if self._sampler is not None:
            self._sampler.weights = self._held.record.weights
        return self._held.record

    def detach(self) -> None:
        """Give the optimizer its local scheme back."""
        _restore_local_scheme(ref(self.optimizer), self._held)

    def state_dict(self) -> dict[str, Any]:
        """Everything to resume with, exactly, also in the middle of an epoch.

        Save the states of model, optimizer and random numbers with it, as for any training. The
        batches of a broken epoch are read again up to where it stopped, and dropped.
        """
        record = None
        if self.record is not None:
            known = {f.name: getattr(self.record, f.name) for f in fields(self.record)}
            record = {name: t for name, t in known.items() if t is None or isinstance(t, Tensor)}
        return {
            "record": record,
            "batches": self._batches,
            "renewed_at": self._renewed_at,
            "loader": self.loader.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of `state_dict`, for the same data set, loader and ``use``.

        Raises:
            ValueError: weights of another data set, a state of the other ``use``, or of the
                middle of another process's epoch; nothing has changed then.
        """
        record = state_dict["record"]
        if record is not None:
            check_sample_weights(record["weights"], self._reader.size)
        if (state_dict["sampler"] is None) != (self._sampler is None):
            raise ValueError(
                "the state is that of a GlobalScheme with another use=: expected one with "
                f"use={USES[self._sampler is not None]!r}"
            )
        if self._sampler is not None:
            check_sample_weights(state_dict["sampler"]["weights"], self._reader.size)
        self.loader.check(state_dict["loader"])
        if record is not None:
            device = next(self._model.parameters()).device
            record = {name: None if t is None else t.to(device) for name, t in record.items()}
        self._held.record = None if record is None else StepRecord(**record)
        self._batches = state_dict["batches"]
        self._renewed_at = state_dict["renewed_at"]
        if self.unit == "epochs":  # counted in batches, of which other processes have more or fewer
            held_for = self._batches - self._renewed_at
            held_for = round(held_for * len(self.loader) / state_dict["loader"]["length"])
            self._renewed_at = self._batches - held_for
        self.loader.load_state_dict(state_dict["loader"])
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict["sampler"])

    def _take(self, indices: Tensor) -> None:
        self._batches += 1
        self._held.indices = indices

    def _now(self) -> int:
        return self.optimizer.steps if self.unit == "steps" else self._batches

    def _renew_if_due(self) -> None:
        if self.optimizer.steps < self.optimizer.warmup_steps:
            return
        held_for = self.refresh if self.unit == "steps" else self.refresh * len(self.loader)
        if self.record is None or self._now() - self._renewed_at >= held_for:
            self.renew()


def _restore_local_scheme(of: ref[IRWOptimizer], held: HeldWeights) -> None:
    optimizer = of()
    if optimizer is not None and optimizer.scheme is held:
        optimizer.scheme = optimizer.local_scheme


def _rank_and_world_size(loader: DataLoader[Any]) -> tuple[int, int]:
    """This process's rank, and how many there are: the loader's sampler says so, or the group."""
    sampler, (rank, number) = loader.sampler, place()
    return getattr(sampler, "rank", rank), getattr(sampler, "num_replicas", number)


def _uniform_sampler(size: int, seed: int, share: tuple[int, int]) -> ResamplingSampler:
    """Draws evenly until the first weights are there; a process draws its share."""
    rank, world_size = share
    return ResamplingSampler(
        torch.ones(size),
        generator=torch.Generator().manual_seed(seed),
        rank=rank,
        world_size=world_size,
    )
