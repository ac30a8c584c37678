"""Samples drawn by their weights, and resumable epochs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from irw_optim.arguments import check_state, true_or_false, whole_number
from irw_optim.torch_internals import place

from .reading import as_indices, idle_copy, sampler_of


class ResamplingSampler(Sampler[int]):
    """Draws dataset indices with probability proportional to their weights.

    Every epoch has its own draws, by the seed and the epoch's number alone. New ``weights`` count
    from the next index on (without replacement, the next epoch); a DataLoader with workers has up
    to ``num_workers * prefetch_factor`` batches drawn in advance.

    Args:
        weights: (N,) non-negative, not all 0; need not sum to 1.
        num_samples: draws an epoch, over all ranks; None takes N.
        replacement: whether a sample may come twice. Without it, the inclusion probabilities are
            not proportional to the weights, which with ``num_samples=N`` only order the epoch.
        generator: gives the seed, drawn from it once; None is seed 0. All ranks need equal seeds.
        rank: of this process, which takes the draws ``rank``, ``rank + world_size``, ... of those
            that one process would make, lengthened to a multiple as in DistributedSampler.
        world_size: number of processes. None for both takes the process group's, if there is one.

    Raises:
        TypeError, ValueError: weights that cannot be drawn by; more draws without replacement than
            positive weights; another argument that is impossible.

    >>> sampler = ResamplingSampler(torch.tensor([0.0, 3.0, 1.0]), num_samples=8)
    >>> first, second = list(sampler), list(sampler)
    >>> 0 in first, len(first), first == second
    (False, 8, False)
    >>> sampler.set_epoch(0)
    >>> list(sampler) == first
    True
    """

    def __init__(
        self,
        weights: Tensor,
        num_samples: int | None = None,
        *,
        replacement: bool = True,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_sample_weights(weights)
        if rank is None and world_size is None:
            rank, world_size = place()
        if rank is None or world_size is None:
            raise ValueError(f"rank={rank!r}, world_size={world_size!r}: expected both or neither")
        self.rank = whole_number("rank", rank, 0)
        self.world_size = whole_number("world_size", world_size, 1)
        if self.rank >= self.world_size:
            raise ValueError(f"rank={rank!r}: expected 0 <= rank < world_size={world_size!r}")
        draws = len(weights) if num_samples is None else num_samples
        asked = whole_number("num_samples", draws, 1)
        self.num_samples = -(-asked // self.world_size)
        self.replacement = true_or_false("replacement", replacement)
        self.seed = 0
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise TypeError(f"generator={generator!r}: expected a torch.Generator or None")
            seed = torch.empty((), dtype=torch.int64, device=generator.device)
            self.seed = int(seed.random_(generator=generator))
        self.epoch = 0
        self._drawn: list[int] = []
        self._repeated: list[int] = []
        self._weights = weights
        self.weights = weights

    @property
    def weights(self) -> Tensor:
        """(N,); set new ones of the same length at any time."""
        return self._weights

    @weights.setter
    def weights(self, weights: Tensor) -> None:
        check_sample_weights(weights, len(self._weights))
        weights = weights.detach().cpu()
        possible, asked = int((weights > 0).sum()), self.num_samples * self.world_size
        if not self.replacement and asked > possible:
            raise ValueError(
                f"num_samples={asked} without replacement, but only {possible} weights are "
                "positive: expected no more draws than that, or replacement=True"
            )
        self._weights = weights
        # A weight of 0 leaves two equal entries, and the search skips the second.
        self._cumulative = weights.double().cumsum(0)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator("cpu").manual_seed((self.seed + self.epoch) % 2**63)
        self.epoch += 1
        self._drawn, self._repeated = self._repeated, []
        asked = self.num_samples * self.world_size
        number = asked if self.replacement else len(self.weights)
        draws = torch.rand(number, generator=generator, dtype=torch.float64, device="cpu")
        own = slice(self.rank, asked, self.world_size)
        if self.replacement:
            return self._with_replacement(draws[own], self._drawn)
        # First arrivals of exponential clocks with these rates (Efraimidis and Spirakis 2006).
        arrivals = -torch.log1p(-draws) / self.weights
        return iter(arrivals.argsort()[own].tolist())

    def set_epoch(self, epoch: int) -> None:
        """The next iteration's; else epochs count up."""
        self.epoch = whole_number("epoch", epoch, 0)

    def resume_epoch(self) -> None:
        """Go on with the epoch that was broken off, and its draws."""
        self.epoch -= 1
        self._repeated = self._drawn

    def state_dict(self) -> dict[str, Any]:
        """Weights, seed, next epoch, and the draws of this one."""
        drawn = torch.tensor(self._drawn, dtype=torch.int64, device="cpu")
        return {"weights": self.weights, "seed": self.seed, "epoch": self.epoch, "drawn": drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of `state_dict`, of as many weights."""
        check_state("state_dict", state_dict, *self.state_dict())
        seed, epoch = (whole_number(name, state_dict[name], 0) for name in ("seed", "epoch"))
        if (drawn := as_indices(state_dict["drawn"])) is None:
            raise TypeError(f"drawn={state_dict['drawn']!r}: expected whole numbers of shape (n,)")
        self.weights = state_dict["weights"]
        self.seed, self.epoch, self._drawn = seed, epoch, drawn.tolist()

    def _with_replacement(self, draws: Tensor, drawn: list[int]) -> Iterator[int]:
        yield from list(drawn)
        while len(drawn) < len(draws):
            cumulative = self._cumulative
            total = cumulative[-1]
            # Behind the total itself there is nobody.
            points = (draws[len(drawn) :] * total).clamp(
                max=total.nextafter(torch.zeros_like(total))
            )
            for index in torch.searchsorted(cumulative, points, right=True).tolist():
                if self._cumulative is not cumulative:  # new weights
                    break
                drawn.append(index)
                yield index


@dataclass(eq=False)
class ResumableLoader:
    """Goes on with a broken epoch: its batches are read again, and dropped up to where it stopped.

    Orders drawn from torch's random numbers, or by a `ResamplingSampler`, come out the same.
    ``share`` is this process's rank, and of how many.
    """

    loader: DataLoader[Any]
    before_batch: Callable[[], None]
    share: tuple[int, int]
    position: int = 0

    def __post_init__(self) -> None:
        self._resumes = False
        self._start_states: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = self._resume() if self._resumes else self._start()
        while True:
            if self.position != len(self):  # where most epochs end, but not all
                self.before_batch()
            batch = next(batches, None)
            if batch is None:
                break
            self.position += 1
            yield batch
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Batches given so far, and the random states at the beginning."""
        began_with = list(self._start_states)
        return {"position": self.position, "began_with": began_with, **self._setting()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, after `check`, at the next iteration."""
        self.position = state_dict["position"]
        self._start_states = [state.cpu() for state in state_dict["began_with"]]
        self._resumes = self.position > 0

    def check(self, state_dict: dict[str, Any]) -> None:
        """Refuse the middle of another process's epoch, or of one with other batches."""
        check_state('state_dict["loader"]', state_dict, "position", "began_with", "length")
        if not whole_number("position", state_dict["position"], 0):
            return
        for name, here in self._setting().items():
            if (was := state_dict.get(name, here)) != here:
                raise ValueError(
                    f"the state is from the middle of an epoch with {name}={was}, and here it is "
                    f"{here}: expected the same, or one saved between epochs"
                )

    def _setting(self) -> dict[str, Any]:
        """What the middle of an epoch depends on."""
        rank, number = self.share
        return {
            # A DistributedSampler's order is that of its seed and epoch.
            "world_size": number,
            "rank": 0 if hasattr(sampler_of(self.loader), "num_replicas") else rank,
            "length": len(self),
            "batch_size": getattr(self.loader.batch_sampler, "batch_size", None),
            "generators": len(self._generators()),
        }

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
        torch.set_rng_state(now)  # the loop's own; the generators have moved on as before
        return batches

    def _generators(self) -> list[torch.Generator]:
        sources = (self.loader, self.loader.sampler, sampler_of(self.loader))
        found = [getattr(source, "generator", None) for source in sources]
        return list({id(g): g for g in found if g is not None}.values())


def check_sample_weights(weights: object, size: int | None = None) -> None:
    """Raise for weights, (N,), not of this ``size``, or that cannot be drawn by."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights is {kind}: expected a floating-point tensor of shape (N,)")
    if weights.ndim != 1:
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected (N,)")
    if size is not None and len(weights) != size:
        wrong = f"{len(weights)} entries but the data set has {size} samples: they are stale or "
        wrong += "belong to another data set"
    elif len(broken := (~weights.isfinite()).nonzero().flatten()):
        wrong = f"{len(broken)} NaN or infinite entries, the first at index {broken[0]}"
    elif bool((weights < 0).any()):
        wrong = f"negative entries, down to {float(weights.min()):g}"
    elif bool((weights > 0).any()):
        return
    else:
        wrong = "no positive entry: nobody would be drawn or count"
    raise ValueError(f"weights has {wrong}; make new ones with global_weights(...)")
