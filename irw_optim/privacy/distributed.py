"""DP-IRW over several processes: one logical batch, one noise, one public state.

Each rank draws from its own shard; the ranks' sums and rank 0's noise are reduced before anything
is released. So every rank computes the same next state, and the step is that of one process on the
joined batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch import Tensor
from torch.utils.data import DataLoader

from .optimizer import IRWDPOptimizer


class DistributedIRWDPOptimizer(IRWDPOptimizer):
    """`IRWDPOptimizer` whose sums run over all ranks, with the noise of rank 0; arguments as there.

    ``expected_batch_size`` is that of all ranks together.
    """

    def _noise(self, std: float, like: Tensor) -> Tensor:
        return super()._noise(std, like) if dist.get_rank() == 0 else torch.zeros_like(like)

    def _noisy(self, total: Tensor, std: float) -> Tensor:
        noisy = super()._noisy(total, std)
        dist.all_reduce(noisy)
        return noisy


class _EveryDraw(DistributedUniformWithReplacementSampler):  # type: ignore[misc]  # untyped
    """Poisson sampling from this rank's shard, the draws of nobody included.

    Opacus' own sampler leaves those out: the rank would miss a step that the others take. And it
    draws from the default generator, which scripts seed alike on all ranks: amplification by
    sampling needs independent draws.
    """

    def __iter__(self) -> Iterator[list[int]]:
        seeded = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
        order = torch.randperm(self.total_size, generator=seeded, device="cpu")
        mine = order[self.rank :: self.num_replicas]
        for _ in range(len(self)):
            chances = torch.rand(len(mine), generator=self.generator, device="cpu")
            yield mine[chances < self.sample_rate].tolist()


def every_draw(loader: DataLoader[Any], secure_rng: Any = None) -> DataLoader[Any]:
    """Opacus' distributed Poisson loader with independent draws on every rank, empty ones included.

    They come from the initial seed of the loader's generator and the rank, or from the system.
    """
    generator = secure_rng
    if generator is None:
        generator = torch.Generator()
        if loader.generator is None:
            generator.seed()
        else:
            generator.manual_seed(loader.generator.initial_seed() + 1 + dist.get_rank())
    same = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "prefetch_factor",
        "persistent_workers",
    )
    shard: Any = loader.batch_sampler
    sampler = _EveryDraw(
        total_size=shard.total_size, sample_rate=shard.sample_rate, generator=generator
    )
    return DataLoader(
        loader.dataset, batch_sampler=sampler, **{name: getattr(loader, name) for name in same}
    )
