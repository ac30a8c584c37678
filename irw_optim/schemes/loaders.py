"""Which loaders the global scheme takes, and what is made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

from irw_optim.schemes.resampling import ResamplingSampler


def check_loader(loader: object) -> None:
    """Refuse what has no samples that can be read by index, or draws from only some of them."""
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
    sampler = _sampler_of(loader)
    if isinstance(sampler, SubsetRandomSampler):
        raise ValueError(
            f"loader has a SubsetRandomSampler: it draws {len(sampler)} of the "
            f"{len(loader.dataset)} samples, but the weights would be those of all of them; use "
            "DataLoader(torch.utils.data.Subset(dataset, indices), shuffle=True, ...)"
        )


def _sampler_of(loader: DataLoader[Any]) -> Any:
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


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


class ResumableLoader:
    """Iterates over a loader; its state says how far, and what the order was drawn from.

    A broken epoch goes on: its batches are read again up to where it stopped, and dropped. Orders
    drawn from torch's random numbers, or by a `ResamplingSampler`, come out the same.

    Args:
        loader: any DataLoader.
        before_batch: called before each batch is drawn, dropped ones excepted.
        share: this process's rank, and how many processes draw from the data set.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        before_batch: Callable[[], None],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.loader = loader
        self.share = share
        self.before_batch = before_batch
        self.position = 0
        self._resumes = False
        self._start_states: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = self._resume() if self._resumes else self._start()
        while self.position < len(self.loader):
            self.before_batch()
            batch = next(batches, None)
            if batch is None:
                break
            self.position += 1
            yield batch
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Batches given so far, and the random states at the epoch's beginning."""
        return {
            "position": self.position,
            "began_with": list(self._start_states),
            "share": self.share,
            "length": len(self),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there at the next iteration; errors as `check`, with nothing changed."""
        self.check(state_dict)
        self.position = state_dict["position"]
        self._start_states = [state.cpu() for state in state_dict["began_with"]]
        self._resumes = self.position > 0

    def check(self, state_dict: dict[str, Any]) -> None:
        """Raise a ValueError for the middle of an epoch that was another process's."""
        saved, own = tuple(state_dict["share"]), self.share
        if not state_dict["position"] or saved == own:
            return
        # A DistributedSampler's order is that of its seed and epoch, on all ranks the same.
        if saved[1] == own[1] and hasattr(_sampler_of(self.loader), "num_replicas"):
            return
        raise ValueError(
            f"the state is from the middle of an epoch of process {saved[0]} of {saved[1]}, and "
            f"this is process {own[0]} of {own[1]}: expected a state saved between epochs, or by "
            "each process for itself"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "loader": idle_copy(self.loader)}

    def _start(self) -> Iterator[Any]:
        self.position = 0
        self._start_states = [torch.get_rng_state()]
        self._start_states += [generator.get_state() for generator in self._generators()]
        return iter(self.loader)

    def _resume(self) -> Iterator[Any]:
        self._resumes = False
        now = torch.get_rng_state()
        shared, *own = self._start_states
        torch.set_rng_state(shared)
        for generator, state in zip(self._generators(), own, strict=True):
            generator.set_state(state)
        if isinstance(self.loader.sampler, ResamplingSampler):
            self.loader.sampler.resume_epoch()
        batches = iter(self.loader)
        for _ in range(self.position):
            next(batches)
        torch.set_rng_state(now)  # the loop's own; the generators have moved on as they had before
        return batches

    def _generators(self) -> list[torch.Generator]:
        """What the order may be drawn from, the global random numbers apart."""
        sources = (self.loader, self.loader.sampler, _sampler_of(self.loader))
        found = [getattr(source, "generator", None) for source in sources]
        return list({id(g): g for g in found if g is not None}.values())
