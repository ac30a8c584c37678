"""A loader's samples by their index, in batches that know which they hold."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    default_collate,
)

from irw_optim.arguments import whole_number

from .order import Arrangement, RefusedError, rearranged, refuse_sorting


def check_loader(loader: object) -> None:
    """Refuse what has no samples by index, or draws only some."""
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"loader={loader!r}: expected a torch.utils.data.DataLoader over a map-style data set"
        )
    iterable = isinstance(loader.dataset, IterableDataset)
    if iterable or not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            f"loader.dataset is {'iterable' if iterable else 'without a length'} "
            f"({type(loader.dataset).__name__}): expected a map-style data set, with __getitem__ "
            "and __len__; the local scheme, IRWOptimizer by itself, takes any stream of batches"
        )
    if loader.batch_sampler is None:
        raise ValueError(
            "loader has batch_size=None, and an index is no sample: expected DataLoader(dataset, "
            "batch_size=64)"
        )
    sampler = sampler_of(loader)
    if isinstance(sampler, SubsetRandomSampler):
        raise ValueError(
            f"loader has a SubsetRandomSampler: it draws {len(sampler)} of the "
            f"{len(loader.dataset)} samples that would have weights; use "
            "DataLoader(torch.utils.data.Subset(dataset, indices), shuffle=True, ...)"
        )


def sampler_of(loader: DataLoader[Any]) -> Any:
    """What a loader's order comes from."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


_WORKERS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
)


def _loader_like(loader: DataLoader[Any], data: Dataset[Any], **changes: Any) -> DataLoader[Any]:
    return DataLoader(data, **{name: getattr(loader, name) for name in _WORKERS} | changes)


def idle_copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy without persistent workers."""
    idle = copy(loader)
    idle._iterator = None
    return idle


class IndexedDataset(Dataset[tuple[int, Any]]):
    """A map-style data set whose samples come with their index: ``data[i] == (i, dataset[i])``.

    A loader over it yields ``(indices, batch)``, for `GlobalScheme.select`.

    Args:
        dataset: map-style, with a length.

    Raises:
        TypeError: an iterable data set, or one without a length.

    >>> from torch.utils.data import TensorDataset
    >>> data = IndexedDataset(TensorDataset(torch.tensor([5.0, 6.0, 7.0])))
    >>> data[1]
    (1, (tensor(6.),))
    >>> next(iter(DataLoader(data, batch_size=2)))
    [tensor([0, 1]), [tensor([5., 6.])]]

    Its loader takes ``collate_fn=data.collate(collate_fn)``. One that sorts, leaves out or repeats
    samples takes the pairs, and says what it did, ``(indices, batch)``: ``docs/schemes.md``.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        check_loader(DataLoader(dataset))
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        """A batch of samples at once."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[i] for i in indices] if fetch is None else fetch(indices)
        if len(samples) != len(indices):
            raise ValueError(
                f"__getitems__ of {type(self.dataset).__name__} returned {len(samples)} samples "
                f"for {len(indices)} indices: expected one for each"
            )
        return list(zip(indices, samples, strict=True))

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> "IndexedCollate":
        """A ``collate_fn`` that keeps the order, for ``(index, sample)`` pairs."""
        return IndexedCollate(collate_fn)


class IndexedCollate:
    """Collates ``(index, sample)`` pairs, with a look at the order."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn
        self.uses = 0

    def __call__(self, pairs: Sequence[tuple[int, Any]]) -> tuple[Tensor, Any]:
        """``(indices, batch)``, the indices int64, (B,)."""
        indices, samples = zip(*pairs, strict=True)
        self.uses += 1
        if _is_due(self.uses) and self.collate_fn is not default_collate:
            refuse_sorting(self.collate_fn, samples)
        return torch.tensor(indices, device="cpu"), self.collate_fn(list(samples))


def _is_due(uses: int) -> bool:
    """At uses 1, 2, 4, 8, ...: what keeps an order today may not for ever."""
    return uses & (uses - 1) == 0


def as_indices(values: object) -> Tensor | None:
    """Whole numbers, (B,), as int64 on the CPU; None for masks and all else."""
    try:
        told = torch.as_tensor(values if isinstance(values, Tensor) else np.array(values))
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = torch.can_cast(told.dtype, torch.int64) and told.dtype != torch.bool
    return told.to("cpu", torch.int64) if told.ndim == 1 and (whole or not len(told)) else None


def indices_and_batch(batch: Any) -> tuple[Tensor, Any]:
    """Of a batch of an `IndexedDataset`: indices, (B,) int64 on the CPU, and the rest."""
    if isinstance(batch, list | tuple) and len(batch) == 2:
        indices, rest = batch
        if (told := as_indices(indices)) is not None:
            return told, rest
    raise TypeError(
        f"collate_fn made a {type(batch).__name__} of an IndexedDataset's (index, sample) pairs: "
        "expected (indices, batch), with the index of every sample in its order"
    )


def indexed_loader(loader: DataLoader[Any], sampler: Sampler[int] | None = None) -> DataLoader[Any]:
    """A loader of the same batches, as of an `IndexedDataset`."""
    check_loader(loader)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"loader is a {type(loader).__name__}, which has an iteration of its own: give the "
            "DataLoader it was made from, or iterate over one of an IndexedDataset(dataset) and "
            "call scheme.select(indices) before each batch"
        )
    data, collate = loader.dataset, loader.collate_fn
    if not isinstance(data, IndexedDataset):
        data, collate = IndexedDataset(data), IndexedCollate(collate)
    shape: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if sampler is None:
        try:
            len(loader)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise TypeError(
                f"loader has no length ({error}): expected a sampler with __len__, "
                "the batches of an epoch"
            ) from error
    else:
        size = getattr(loader.batch_sampler, "batch_size", None)
        if size is None:
            raise ValueError(
                f"loader has a {type(loader.batch_sampler).__name__} without a batch_size, and "
                "resampling draws the batches itself: expected DataLoader(dataset, batch_size=64)"
            )
        drop_last = getattr(loader.batch_sampler, "drop_last", False)
        shape = {"batch_size": size, "drop_last": drop_last, "sampler": sampler}
    own = {"generator": loader.generator, "persistent_workers": loader.persistent_workers}
    return _loader_like(loader, data, collate_fn=collate, **shape, **own)


class DatasetReader:
    """A loader's data set in any order, without its sampler and generator."""

    def __init__(self, loader: DataLoader[Any], batch_size: int | None = None) -> None:
        check_loader(loader)
        own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        size = own if batch_size is None else batch_size
        self.loader = loader
        none = "batch_size=64, say: the loader's batch sampler has none" if size is None else ""
        self.batch_size = whole_number("batch_size", size, 1, none)
        self.uses = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "loader": idle_copy(self.loader)}

    @property
    def size(self) -> int:
        """N, as of now: a data set may grow."""
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def check_is_due(self) -> bool:
        """Whether this use looks at the order."""
        self.uses += 1
        return _is_due(self.uses)

    def batches(
        self, samples: Tensor, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield dataset indices, (n,) on the CPU, in batches of these sizes: (places, batch)."""
        if not len(samples):
            return
        pieces = samples.split(self.batch_size if sizes is None else list(sizes))
        loader = self._loader([piece.tolist() for piece in pieces], self.loader.collate_fn)
        start = 0
        for piece, batch in zip(pieces, loader, strict=True):
            places, batch = self._places(piece, batch)
            yield start + places, batch
            start += len(piece)

    def rearranged(
        self, samples: Tensor, arrangements: Sequence[Arrangement]
    ) -> Iterator[tuple[Tensor, Any]]:
        """The same for each arrangement of samples, which are read once."""
        collate = partial(rearranged, self.loader.collate_fn, arrangements)
        (batches,) = self._loader([samples.tolist()], collate)
        for (order, _), batch in zip(arrangements, batches, strict=True):
            if isinstance(batch, RefusedError):
                raise batch
            taken = torch.tensor(order, device="cpu")
            places, batch = self._places(samples[taken], batch)
            yield taken[places], batch

    def _loader(self, batches: Sequence[list[int]], collate: Callable[[Any], Any]) -> Any:
        loader, workers = self.loader, min(self.loader.num_workers, len(batches))
        own = {"batch_sampler": batches, "num_workers": workers, "collate_fn": collate}
        return _loader_like(loader, loader.dataset, **own)

    def _places(self, piece: Tensor, batch: Any) -> tuple[Tensor, Any]:
        if not isinstance(self.loader.dataset, IndexedDataset):
            return torch.arange(len(piece), device="cpu"), batch
        told, batch = indices_and_batch(batch)
        wanted, places = piece.sort()
        found, order = told.sort()
        if not torch.equal(wanted, found):
            missing = sorted(set(wanted.tolist()) - set(found.tolist()))
            raise ValueError(
                f"collate_fn made a batch of the samples {told.tolist()[:10]} out of "
                f"{piece.tolist()[:10]} (without {missing[:10]}): expected each sample once"
            )
        return torch.empty_like(order).index_copy(0, order, places), batch
