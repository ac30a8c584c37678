"""DP-IRW over several processes: one logical batch, one noise, one public state.

Each rank draws from its own shard and adds up its own samples; the ranks' sums and rank 0's noise
are reduced before anything is released. So every rank computes the same next threshold, scale and
direction, and the step is that of one process on the joined batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .optimizer import IRWDPOptimizer

__all__ = ["DistributedIRWDPOptimizer", "every_draw"]


class DistributedIRWDPOptimizer(IRWDPOptimizer):
    """`IRWDPOptimizer` whose sums run over all ranks; arguments as there.

    ``expected_batch_size`` is that of all ranks together. The noise is drawn on rank 0, from its
    generator.
    """

    def _noise(self, std: float, like: Tensor) -> Tensor:
        return super()._noise(std, like) if dist.get_rank() == 0 else torch.zeros_like(like)

    def _over_ranks(self, total: Tensor) -> Tensor:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total


class _EveryDraw(Sampler[list[int]]):
    """Poisson sampling from this rank's shard, the draws of nobody included.

    Opacus' own sampler leaves those out: the rank would miss a step that the others take. And it
    draws from the process's default generator, which scripts seed alike on all ranks: samples of
    different shards would come together, and amplification by sampling needs them independent.
    """

    def __init__(self, shard: DistributedUniformWithReplacementSampler, generator: Any) -> None:
        self.shard = shard
        self.generator = generator

    def __len__(self) -> int:
        return len(self.shard)

    def __iter__(self) -> Iterator[list[int]]:
        shard = self.shard
        order = torch.arange(shard.total_size, device="cpu")
        if shard.shuffle:
            seeded = torch.Generator().manual_seed(shard.shuffle_seed + shard.epoch)
            order = torch.randperm(shard.total_size, generator=seeded, device="cpu")
        mine = order[shard.rank :: shard.num_replicas]
        for _ in range(len(self)):
            drawn = (
                torch.rand(len(mine), generator=self.generator, device="cpu") < shard.sample_rate
            )
            yield mine[drawn].tolist()


def every_draw(loader: DataLoader[Any], secure_rng: Any = None) -> DataLoader[Any]:
    """The loader with independent draws on every rank, empty ones included.

    Args:
        loader: Opacus' distributed Poisson loader. If it has a generator, the rank's draws come
            from the generator's initial seed and the rank, else from the system's entropy.
        secure_rng: the generator of Opacus' secure mode, if on.
    """
    generator = secure_rng
    if generator is None:
        generator = torch.Generator()
        if loader.generator is None:
            generator.seed()
        else:
            generator.manual_seed(loader.generator.initial_seed() + 1 + dist.get_rank())
    return DataLoader(
        dataset=loader.dataset,
        batch_sampler=_EveryDraw(loader.batch_sampler, generator),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
