"""Batches that know which samples of the data set they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from irw_optim.schemes.order import refuse_sorting
from irw_optim.schemes.requirements import check_loader


class IndexedDataset(Dataset[tuple[int, Any]]):
    """A map-style data set whose samples come with their index: ``data[i] == (i, dataset[i])``.

    A loader over it yields ``(indices, batch)``. `GlobalScheme` makes such a loader itself; this
    is for loops with a loader of their own, which call `GlobalScheme.select`.

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

    A ``collate_fn`` of your own that keeps the samples in their order goes on working on samples
    without an index:

    >>> loader = DataLoader(data, batch_size=2, collate_fn=data.collate(lambda samples: samples))
    >>> next(iter(loader))
    (tensor([0, 1]), [(tensor(5.),), (tensor(6.),)])

    One that sorts, leaves out or repeats samples takes the pairs, and says what it did. A loader
    like this one may be given to `GlobalScheme` and `irw_optim.schemes.global_weights` as well:

    >>> def longest_first(pairs):
    ...     indices, samples = zip(*sorted(pairs, key=lambda pair: -pair[1][0]))
    ...     return torch.tensor(indices), torch.stack([x for x, in samples])
    >>> next(iter(DataLoader(data, batch_size=3, collate_fn=longest_first)))
    (tensor([2, 1, 0]), tensor([7., 6., 5.]))
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        check_loader(DataLoader(dataset))
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        """A batch of samples at once, as data sets offer it that are quicker that way."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[i] for i in indices] if fetch is None else fetch(indices)
        if len(samples) != len(indices):
            raise ValueError(
                f"__getitems__ of {type(self.dataset).__name__} returned {len(samples)} samples "
                f"for {len(indices)} indices: expected a list with one sample for each"
            )
        return list(zip(indices, samples, strict=True))

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> IndexedCollate:
        """A ``collate_fn`` for the samples as they are, made one for ``(index, sample)`` pairs."""
        return IndexedCollate(collate_fn)


class IndexedCollate:
    """Collates ``(index, sample)`` pairs into ``(indices, batch)``; a class, so that it pickles.

    Args:
        collate_fn: collates the samples, in their order.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn
        self.uses = 0

    def __call__(self, pairs: Sequence[tuple[int, Any]]) -> tuple[Tensor, Any]:
        """Collate the samples; ``indices`` is int64, (B,).

        Raises:
            ValueError: a ``collate_fn`` that makes the same batch of the samples in another order;
                looked at in uses 1, 2, 4, ...
        """
        indices, samples = zip(*pairs, strict=True)
        self.uses += 1
        if self.uses & (self.uses - 1) == 0 and self.collate_fn is not default_collate:
            refuse_sorting(self.collate_fn, samples)
        return torch.tensor(indices), self.collate_fn(list(samples))


class ToldCollate:
    """A ``collate_fn`` of ``(index, sample)`` pairs that says itself which samples it took.

    Args:
        collate_fn: returns ``(indices, batch)``.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, pairs: list[Any]) -> tuple[Tensor, Any]:
        """The indices as a tensor, (B,) int64, and the batch."""
        return told_by(self.collate_fn(pairs))


def told_by(batch: Any) -> tuple[Tensor, Any]:
    """A batch of an `IndexedDataset` as indices, (B,) int64 on the CPU, and the rest.

    Raises:
        TypeError: it does not begin with indices.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        indices, rest = batch
        told = torch.as_tensor(indices) if isinstance(indices, Tensor | list | tuple) else None
        if told is not None and told.ndim == 1 and not told.is_floating_point():
            return told.to("cpu", torch.int64), rest
    raise TypeError(
        f"collate_fn made a {type(batch).__name__} of the (index, sample) pairs of an "
        "IndexedDataset: expected (indices, batch), with the dataset index of every sample of the "
        "batch, in its order"
    )


def indexed_loader(loader: DataLoader[Any], sampler: Sampler[int] | None = None) -> DataLoader[Any]:
    """A loader of the same batches, in the same order, each with its indices in front.

    Args:
        loader: a plain DataLoader; its sampler and generator are shared, not copied.
        sampler: takes the place of the loader's own.

    Raises:
        TypeError, ValueError: `check_loader`'s; a loader that does more than DataLoader does.
    """
    check_loader(loader)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"loader is a {type(loader).__name__}, which has an iteration of its own: give the "
            "DataLoader it was made from, or iterate over your own loader of an "
            "IndexedDataset(dataset) and call scheme.select(indices) before each batch"
        )
    data = loader.dataset
    collate: Callable[[Any], Any] = ToldCollate(loader.collate_fn)
    if not isinstance(data, IndexedDataset):
        data, collate = IndexedDataset(data), IndexedCollate(loader.collate_fn)
    shape: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    if sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", None)
        drop_last = getattr(loader.batch_sampler, "drop_last", False)
        if size is None:
            raise ValueError(
                f"loader has a {type(loader.batch_sampler).__name__} without a batch_size: "
                "resampling draws the batches itself and needs DataLoader(dataset, batch_size=64)"
            )
        shape = {"batch_size": size, "drop_last": drop_last, "sampler": sampler}
    return DataLoader(
        data,
        **shape,
        num_workers=loader.num_workers,
        collate_fn=collate,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
