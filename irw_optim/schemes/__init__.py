"""The global scheme (arXiv 2411.03068): weights of a whole data set, renewed now and then."""

from collections.abc import Iterator
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from irw_optim.arguments import check_state, one_of, whole_number
from irw_optim.criterion import validate_criterion
from irw_optim.metrics._groups import ArrayLike
from irw_optim.optimizer import IRWOptimizer
from irw_optim.optimizer.options import refuse_private
from irw_optim.torch_internals import place
from irw_optim.weighting import LocalScheme, StepRecord

from .batch_losses import BatchLosses, Forward, warn_once
from .global_weights import ClassByClassSampler, global_weights
from .reading import DatasetReader, IndexedDataset, as_indices, indexed_loader, indices_and_batch
from .resampling import ResamplingSampler, ResumableLoader
from .weighing import HeldWeights, record_of, weigh_dataset

__all__ = [
    "ClassByClassSampler",
    "GlobalScheme",
    "IndexedDataset",
    "ResamplingSampler",
    "global_weights",
]

USES = ("reweighting", "resampling")


class GlobalScheme:
    """Trains with weights of the whole data set, renewed every ``refresh`` epochs or steps.

    The loop iterates over the scheme in place of its loader. The optimizer's options hold for the
    data set, with ``warmup_steps`` of plain averaging first. A renewal costs about 1.5 epochs of
    plain training. The processes of a DistributedDataParallel, with the same data set each, share
    it out, and step as one process would on all their batches.

    Args:
        optimizer: its local scheme is replaced until `detach`.
        loader: a plain DataLoader over a map-style data set.
        refresh: how long weights are held, in ``unit``. Held for long, they flip from class to
            class: ``docs/schemes.md``.
        unit: ``"epochs"`` (of the loader's length, in batches) or ``"steps"`` of the optimizer.
        use: ``"reweighting"``: batches as the loader draws them, each sample counted by its
            weight, renormalised in the batch. ``"resampling"``: batches drawn with replacement in
            proportion to the weights, without the loader's sampler, and plain steps.
        criterion: None takes the optimizer's.
        forward: as of `global_weights`, for batches that are no pairs.
        batch_size, outlier_block, progress: as there, for the renewals.
        seed: of the draws, with ``use="resampling"``; the same in all processes.

    Raises:
        DPGuaranteeError, TypeError, ValueError: an argument that is impossible.

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
        self._model, criterion = _model_and_criterion_of(optimizer, criterion)
        one_of("use", use, USES)
        self.unit = one_of("unit", unit, ("epochs", "steps"))
        self.optimizer = optimizer
        self.refresh = whole_number("refresh", refresh, 1)
        self.outlier_block = whole_number("outlier_block", outlier_block, 1)
        self.progress = progress
        self._reader = DatasetReader(loader, batch_size)
        self._losses_of = BatchLosses(self._model, criterion, forward)
        rank, number = place()
        rank = getattr(loader.sampler, "rank", rank)
        number = getattr(loader.sampler, "num_replicas", number)
        self._sampler: ResamplingSampler | None = None
        seed = whole_number("seed", seed, 0) % 2**64
        if use == "resampling":
            even, generator = torch.ones(self._reader.size), torch.Generator().manual_seed(seed)
            self._sampler = ResamplingSampler(
                even, generator=generator, rank=rank, world_size=number
            )
        self._equal_on_ranks = {"refresh": self.refresh, "unit": unit, "use": use, "seed": seed}
        indexed = indexed_loader(loader, self._sampler)
        self.loader = ResumableLoader(indexed, self._renew_if_due, (rank, number))
        self._held = HeldWeights(resampled=self._sampler is not None)
        self._batches = self._renewed_at = 0
        optimizer.scheme = self._held
        finalize(self, _restore_local_scheme, ref(optimizer), self._held).atexit = False

    @property
    def record(self) -> StepRecord | None:
        """What the last renewal decided, (N,); None before."""
        return self._held.record

    @property
    def weights(self) -> Tensor | None:
        """The weights held, (N,), sum 1."""
        return None if self.record is None else self.record.weights

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._held.unused = False
        try:
            for drawn in self.loader:
                self._batches += 1
                if self._held.unused:
                    warn_once(
                        self._model,
                        "read ahead: weights are of the batch drawn last; call scheme.select()",
                    )
                self._held.indices, batch = indices_and_batch(drawn)
                self._held.unused = not (self._held.resampled or self.record is None)
                yield batch
        except GeneratorExit:
            if self._held.unused:  # next(iter(scheme)) is this batch
                return
        self._held.indices = None  # a batch from elsewhere is another one

    def select(self, indices: ArrayLike) -> None:
        """Say which samples the next batch holds, in a loop over a loader of an `IndexedDataset`.

        It comes first in the loop, and renews the weights where that is due.

        Args:
            indices: (B,) whole numbers, of the data set.

        Raises:
            TypeError: other indices; of a mask, ``mask.nonzero().squeeze(1)``.
            RuntimeError: the scheme draws the batches itself.
        """
        if self._sampler is not None:
            raise RuntimeError(
                'use="resampling" draws the batches itself: iterate over the scheme, or give '
                'use="reweighting"'
            )
        if (told := as_indices(indices)) is None:
            raise TypeError(f"indices={indices!r}: expected whole numbers of shape (B,)")
        self._renew_if_due()
        self._batches += 1
        self._held.indices = told

    def renew(self) -> StepRecord:
        """Make new weights now, with the model as it is.

        Raises:
            ValueError: the data set has changed its length, and draws were set up.
        """
        if self._sampler is not None and self._reader.size != len(self._sampler.weights):
            raise ValueError(
                f"the data set has {self._reader.size} samples, and had "
                f"{len(self._sampler.weights)} when draws were set up: make a new GlobalScheme"
            )
        optimizer = self.optimizer
        self._held.record = record = weigh_dataset(
            self._reader,
            self._losses_of,
            optimizer.engine,
            optimizer.scored_parameters(),
            optimizer.local_scheme,
            self.outlier_block,
            self.progress,
            None if optimizer.processes is None else optimizer.processes.find(),
            self._equal_on_ranks,
        )
        self._renewed_at = self._now()
        if self._sampler is not None:
            self._sampler.weights = record.weights
        return record

    def detach(self) -> None:
        """Give the optimizer its local scheme back."""
        _restore_local_scheme(ref(self.optimizer), self._held)

    def state_dict(self) -> dict[str, Any]:
        """What resumes, in mid-epoch too, beside model, optimizer and random states."""
        known = {} if self.record is None else vars(self.record)
        record = {name: t for name, t in known.items() if t is None or isinstance(t, Tensor)}
        return {
            "record": record or None,
            "batches": self._batches,
            "renewed_at": self._renewed_at,
            "loader": self.loader.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of `state_dict`, for the same data set, loader and ``use``.

        Raises:
            TypeError, ValueError: a state of others, or of the middle of an epoch of others.
        """
        check_state("state_dict", state_dict, *self.state_dict())
        draws, loader = state_dict["sampler"], state_dict["loader"]
        if (draws is None) != (self._sampler is None):
            use = USES[self._sampler is not None]
            raise ValueError(f"the state is of another use=: expected one with use={use!r}")
        self.loader.check(loader)
        device = next(self._model.parameters()).device
        record = record_of(state_dict["record"], self._reader.size, device)
        batches, since = whole_number("batches", state_dict["batches"], 0), state_dict["renewed_at"]
        if self.unit == "epochs":  # counted in batches: more or fewer by the number of processes
            since = batches - round((batches - since) * len(self.loader) / loader["length"])
        if self._sampler is not None:
            self._sampler.load_state_dict(draws)
        self._held.record, self._batches, self._renewed_at = record, batches, since
        self.loader.load_state_dict(loader)

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


def _model_and_criterion_of(
    optimizer: object, criterion: nn.Module | None
) -> tuple[nn.Module, nn.Module]:
    refuse_private(optimizer)
    if not isinstance(optimizer, IRWOptimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: expected an IRWOptimizer(..., model=model, criterion=...)"
        )
    if not isinstance(optimizer.scheme, LocalScheme):
        raise ValueError(
            "optimizer has a GlobalScheme already: call detach() on that one, or keep it"
        )
    if optimizer.accumulation_steps != 1:
        raise ValueError(
            f"optimizer has accumulation_steps={optimizer.accumulation_steps}: held weights are "
            "renormalised in each backward pass; use accumulation_steps=1, which adds the passes up"
        )
    model = optimizer.engine.model
    if model is None:
        raise ValueError("optimizer has no model: expected IRWOptimizer(..., model=model)")
    criterion = criterion or optimizer.criterion
    if criterion is None:
        raise ValueError(
            "criterion=None and the optimizer has none: expected that of the losses, "
            "GlobalScheme(..., criterion=torch.nn.CrossEntropyLoss())"
        )
    validate_criterion(criterion)
    return model, criterion
