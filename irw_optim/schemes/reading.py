"""Reads any samples of a loader's data set, in a given order, as the loader would collate them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler


class DatasetReader:
    """A loader's data set without the loader's order: no shuffling, no sampler, no drop_last.

    Args:
        loader: gives the data set, ``collate_fn``, the workers and the batch size. It is not
            iterated, so that its sampler and generator stay where they are.
        batch_size: samples read at once; None takes the loader's.

    Raises:
        TypeError, ValueError: `check_loader`'s, or a loader whose batch size is not known.
    """

    def __init__(self, loader: DataLoader[Any], batch_size: int | None = None) -> None:
        check_loader(loader)
        self.loader = loader
        self.batch_size = _batch_size(loader, batch_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "loader": without_workers(self.loader)}

    @property
    def size(self) -> int:
        """N, as of now: a data set may grow."""
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def batches(
        self, samples: Tensor, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield pieces of ``samples`` (dataset indices) with the collated batch of each.

        Args:
            samples: (n,) int64, on the CPU.
            sizes: lengths of the pieces, which sum to n; None for ``batch_size`` each.
        """
        pieces = samples.split(self.batch_size if sizes is None else list(sizes))
        if not len(samples):
            return
        given = self.loader
        loader = DataLoader(
            given.dataset,
            batch_sampler=[piece.tolist() for piece in pieces],
            num_workers=given.num_workers,
            collate_fn=given.collate_fn,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            prefetch_factor=given.prefetch_factor,
        )
        yield from zip(pieces, loader, strict=True)


def without_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader as a copy can have it: persistent workers are this process's own."""
    idle = copy(loader)
    idle._iterator = None
    return idle


def check_loader(loader: object) -> None:
    """Refuse what has no samples that can be read by index, or draws from only some of them.

    Raises:
        TypeError: no DataLoader, or one over an iterable data set or one without a length.
        ValueError: one without automatic batching, or with a SubsetRandomSampler.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"loader={loader!r}: expected a torch.utils.data.DataLoader over a map-style data set"
        )
    name = type(loader.dataset).__name__
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        kind = "iterable" if isinstance(loader.dataset, IterableDataset) else "without a length"
        raise TypeError(
            f"loader.dataset is {kind} ({name}): the global scheme holds one weight for each "
            "index of a map-style data set, with __getitem__ and __len__; the local scheme, "
            "IRWOptimizer by itself, works with any stream of batches"
        )
    if loader.batch_sampler is None:
        raise ValueError(
            "loader has batch_size=None, so that an index of its data set is no sample: expected "
            "a loader that collates samples into batches, DataLoader(dataset, batch_size=64)"
        )
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, SubsetRandomSampler):
        raise ValueError(
            f"loader has a SubsetRandomSampler: it draws {len(sampler)} of the "
            f"{len(loader.dataset)} samples, but the weights would be those of all of them; use "
            "DataLoader(torch.utils.data.Subset(dataset, indices), shuffle=True, ...)"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device.

    Goes into tuples, lists and mappings, and calls ``to`` on what has it.

    >>> to_device({"x": [torch.ones(1)], "name": "a"}, torch.device("cpu"))
    {'x': [tensor([1.])], 'name': 'a'}
    """
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _batch_size(loader: DataLoader[Any], given: int | None) -> int:
    size = given or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(given, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"batch_size={given!r} with a loader of batch size {size!r}: expected the number of "
            "samples to read at once, for example batch_size=256"
        )
    return size
