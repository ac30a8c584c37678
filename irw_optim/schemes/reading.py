"""Reads any samples of a loader's data set, in a given order, as the loader would collate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from irw_optim.arguments import as_whole
from irw_optim.schemes.indexed import IndexedDataset, told_by
from irw_optim.schemes.order import Rearranged, RefusedError
from irw_optim.schemes.requirements import check_loader


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
        self.uses = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "loader": without_workers(self.loader)}

    @property
    def size(self) -> int:
        """N, as of now: a data set may grow."""
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def check_is_due(self) -> bool:
        """At uses 1, 2, 4, 8, ...: what keeps an order today may not for ever."""
        self.uses += 1
        return self.uses & (self.uses - 1) == 0

    @property
    def collates(self) -> bool:
        """Whether the user makes the batches, and not torch."""
        return self.loader.collate_fn is not default_collate

    def batches(
        self, samples: Tensor, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield the collated batches of ``samples`` (dataset indices), piece by piece.

        Each with the places in ``samples`` of those that it holds, in its own order: that of the
        data set, unless the ``collate_fn`` of an `IndexedDataset` says otherwise.

        Args:
            samples: (n,) int64, on the CPU, each once.
            sizes: lengths of the pieces, which sum to n; None for ``batch_size`` each.

        Raises:
            ValueError: a batch that does not hold each of its samples once.
        """
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
        self, samples: Tensor, arrangements: Sequence[tuple[Sequence[int], int]]
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield batches of the same samples, read once, put together in several orders.

        Args:
            samples: (n,) int64, on the CPU, each once.
            arrangements: for each batch, an order of the samples, and the seed of what
                ``collate_fn`` draws.

        Yields:
            As `batches`: the places in ``samples``, and the batch.

        Raises:
            RefusedError: in place of a batch that ``collate_fn`` would not make.
        """
        collate = Rearranged(self.loader.collate_fn, arrangements)
        (batches,) = self._loader([samples.tolist()], collate)
        for (order, _), batch in zip(arrangements, batches, strict=True):
            if isinstance(batch, RefusedError):
                raise batch
            taken = torch.tensor(order)
            places, batch = self._places(samples[taken], batch)
            yield taken[places], batch

    def _loader(self, batches: Sequence[list[int]], collate: Callable[[Any], Any]) -> Any:
        given = self.loader
        return DataLoader(
            given.dataset,
            batch_sampler=batches,
            num_workers=min(given.num_workers, len(batches)),
            collate_fn=collate,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            prefetch_factor=given.prefetch_factor,
        )

    def _places(self, piece: Tensor, batch: Any) -> tuple[Tensor, Any]:
        """Where in the piece the samples of its batch are, and the batch as the model sees it."""
        if not isinstance(self.loader.dataset, IndexedDataset):
            return torch.arange(len(piece)), batch
        told, batch = told_by(batch)
        wanted, places = piece.sort()
        found, order = told.sort()
        if not torch.equal(wanted, found):
            missing = sorted(set(wanted.tolist()) - set(found.tolist()))
            raise ValueError(
                f"collate_fn made a batch of the samples {told.tolist()[:10]} out of "
                f"{piece.tolist()[:10]} (without {missing[:10]}): for the weights of a data set, "
                "expected each sample once, in any order"
            )
        return torch.empty_like(order).index_copy(0, order, places), batch


def without_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader as a copy can have it: persistent workers are this process's own."""
    idle = copy(loader)
    idle._iterator = None
    return idle


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
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    size = as_whole(own if given is None else given)
    if size is None or size < 1:
        raise ValueError(
            f"batch_size={given!r} with a loader of batch size {own!r}: expected the number of "
            "samples to read at once, for example batch_size=256"
        )
    return size
