"""Epochs of a DataLoader that can be broken off and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from irw_optim.schemes.loaders import idle_copy
from irw_optim.schemes.resampling import ResamplingSampler


class ResumableLoader:
    """Iterates over a loader; its state says how far, and what the order was drawn from.

    A broken epoch is gone on with by reading its batches again up to where it stopped, and
    dropping them. Orders drawn from torch's random numbers, or by a `ResamplingSampler`, come out
    the same; a sampler with random numbers of its own would need a state of its own.

    Args:
        loader: any DataLoader.
        share: this process's rank, and how many processes draw from the data set.
        before_batch: called before each batch is drawn, dropped ones excepted.
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
        """Go on from there at the next iteration.

        Raises:
            ValueError: `check`'s; nothing has changed then.
        """
        self.check(state_dict)
        self.position = state_dict["position"]
        self._start_states = [state.cpu() for state in state_dict["began_with"]]
        self._resumes = self.position > 0

    def check(self, state_dict: dict[str, Any]) -> None:
        """Refuse the middle of an epoch that was another process's.

        Between epochs, any process may go on from the state of any other, in any number of them.

        Raises:
            ValueError: that.
        """
        saved, own = tuple(state_dict["share"]), self.share
        if not state_dict["position"] or saved == own:
            return
        # A DistributedSampler's order is that of its seed and epoch, on all ranks the same.
        if saved[1] == own[1] and hasattr(self._sampler, "num_replicas"):
            return
        raise ValueError(
            f"the state is from the middle of an epoch of process {saved[0]} of {saved[1]}, and "
            f"this is process {own[0]} of {own[1]}: expected a state saved between epochs, or by "
            "each process for itself"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "loader": idle_copy(self.loader)}

    @property
    def _sampler(self) -> Any:
        return getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)

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
        loader = self.loader
        sources = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
        found = [getattr(source, "generator", None) for source in sources]
        return list({id(g): g for g in found if g is not None}.values())
