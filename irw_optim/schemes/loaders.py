"""Which loaders the global scheme takes, and loaders made from them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

from irw_optim.arguments import as_whole


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


_WORKERS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
)


def loader_like(
    loader: DataLoader[Any], data: Dataset[Any], collate: Callable[[Any], Any], **changes: Any
) -> DataLoader[Any]:
    """A loader over ``data`` with the workers of another one; ``changes`` say what it draws."""
    same = {name: getattr(loader, name) for name in _WORKERS}
    return DataLoader(data, collate_fn=collate, **{**same, **changes})


def idle_copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader as a copy can have it: persistent workers are this process's own."""
    idle = copy(loader)
    idle._iterator = None
    return idle


def batch_size_of(loader: DataLoader[Any], given: int | None) -> int:
    """How many samples to read at once: those that were asked for, or as the loader does."""
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    size = as_whole(own if given is None else given)
    if size is None or size < 1:
        raise ValueError(
            f"batch_size={given!r} with a loader of batch size {own!r}: expected the number of "
            "samples to read at once, for example batch_size=256"
        )
    return size
