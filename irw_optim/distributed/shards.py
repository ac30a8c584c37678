"""FSDP2: parameters that are whole one layer at a time, and only while a pass goes through it.

What an optimizer holds are shards; what autograd meets are the whole parameters that FSDP gathers
for a layer and frees after it. `fully_shard` puts layers into groups that it gathers together:
they are the unit of everything here, so that no process holds more of P numbers than FSDP does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from irw_optim.backward.weighted_loss import Weigher
from irw_optim.copies import Renewed
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.layerwise import OverShards
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.replicas import Options, Replicas
from irw_optim.distributed.sharded_backward import sharded_loss
from irw_optim.distributed.sharding import groups_of
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.processes import is_sharded


class Shards(Renewed):
    """What an optimizer knows of a model under `fully_shard`.

    Args:
        model: passed `check_shards`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model
        self.begin()

    PASSING = ("_ranks",)

    def begin(self) -> None:
        """Know the process group when it is asked for."""
        self._ranks: Ranks | None = None

    @property
    def ranks(self) -> Ranks:
        """The processes that the parameters are sharded over."""
        if self._ranks is None:
            self._ranks = Ranks(self._group())
        return self._ranks

    def _group(self) -> Any:
        assert self.model is not None, "released"
        shard: Any = next(iter(groups_of(self.model)[0]))
        return shard.device_mesh.get_group()

    def columns(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """The whole parameters of the shards given, group by group, alike on all ranks."""
        chosen = set(parameters)
        groups = [] if self.model is None else groups_of(self.model)
        found = [[whole for shard, whole in group.items() if shard in chosen] for group in groups]
        return [group for group in found if group]

    def leaves_of(self, parameters: Iterable[Tensor]) -> set[Tensor]:
        """What autograd meets of these parameters: whole ones, and those that are no shards."""
        chosen = set(parameters)
        return chosen.union(*self.columns(chosen))

    def names_of(self, parameters: Iterable[Tensor]) -> list[str]:
        """Names in the model of whole parameters; shapes for what is not the model's."""
        assert self.model is not None, "released"
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for group in groups_of(self.model):
            names |= {whole: names[shard] for shard, whole in group.items() if shard in names}
        return [names.get(p, f"a leaf of shape {tuple(p.shape)}") for p in parameters]

    def weigher(self, alone: Weigher, scored: Sequence[Tensor], options: Options) -> Weigher:
        """Who weighs the batch of all processes, or that of this one where each weighs its own."""
        if options.worst_off == "local":
            return alone
        if self._ranks is None:
            self._ranks = Ranks(self._group(), options.described())
        return OverShards(alone.scheme, alone.note, self._ranks, self.columns(scored))

    def weighted_loss(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
    ) -> Tensor:
        """See `sharded_loss`."""
        return sharded_loss(batch, captured, scored, weigher, self)

    def prepare_reducer(self, loss: Tensor) -> None:
        """FSDP hears of a backward pass by itself."""

    def check_reduced(self) -> None:
        """Nothing is added to ``p.grad`` behind FSDP's back."""

    def release(self) -> None:
        """Know the model no longer."""
        self.model = self._ranks = None


Processes = Replicas | Shards


def processes_of(model: nn.Module | None) -> Processes:
    """Who knows of the processes that the model trains in."""
    if model is not None and is_sharded(model):
        return Shards(model)
    return Replicas(model)
