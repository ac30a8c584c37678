"""Which DistributedDataParallel a model is in, and what that asks of a weighted loss."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.attachments import Attachment, Removable, Renewed
from irw_optim.backward.weighted_loss import Weigher, weighted_loss
from irw_optim.torch_internals import at_the_end_of_backward, several_processes

from .ranks import GlobalGradients, Ranks
from .weigher import OverRanks

logger = logging.getLogger("irw_optim")

_AROUND: WeakKeyDictionary[nn.Module, ref[DistributedDataParallel]] = WeakKeyDictionary()
"""The DDP that called a model last: a framework may wrap the model long after the optimizer."""

_TOLD: WeakSet[nn.Module] = WeakSet()  # that they are in no DDP


class CallerNoted(Attachment):
    """Notes which DDP calls a model."""

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            yield module.register_forward_pre_hook(_note_caller)


class Replicas(Renewed):
    """Those of a model that is watched: its DDP may come later."""

    PASSING = ("watch", "ranks", "static", "synced")

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.begin()
        if model is not None and model not in _AROUND and (found := _ddp_around(model)):
            _AROUND[model] = ref(found)

    def begin(self) -> None:
        # A model that is being copied is not whole yet: `find` watches it.
        whole = self.model is not None and bool(vars(self.model))
        self.watch = CallerNoted.on(self.model) if whole else None  # type: ignore[arg-type]
        self.ranks: Ranks | None = None
        self.static: ref[Any] | None = None  # the DDP, where its graph is
        self.synced = True

    def find(self) -> DistributedDataParallel | None:
        if self.model is None:
            return None
        if self.watch is None:
            self.begin()
        around = _AROUND.get(self.model)
        found = replica_in(self.model, None if around is None else around())
        if found is not None:
            check_replica(found)
        return found

    def weigher(
        self,
        alone: Weigher,
        scored: Sequence[Tensor],
        worst_off: str,
        most_passes: int,
        alike: Callable[[], dict[str, Any]],
    ) -> Weigher:
        """Who weighs the batch of all processes, which were told ``alike``, or of this one."""
        model, replica = self.model, self.find()
        self.static = ref(replica) if replica is not None and replica.static_graph else None
        if replica is None:
            meant = worst_off == "local" or not several_processes()
            if not meant and model is not None and model not in _TOLD:
                _TOLD.add(model)
                logger.warning(
                    "%d processes run, but the model is not in DistributedDataParallel: each "
                    "weighs its own batch. Wrap the model, or say worst_off='local' if it is meant",
                    dist.get_world_size(),
                )
            return alone
        if self.static and most_passes > 1:
            raise NotImplementedError(
                f"accumulation_steps={most_passes} in DistributedDataParallel(static_graph=True): "
                "passes without a gradient are no static graph; leave one out"
            )
        self.synced = replica.require_backward_grad_sync
        if worst_off == "local":
            return alone
        if self.ranks is None or self.ranks.group is not replica.process_group:
            self.ranks = Ranks(replica.process_group, alike())
        return OverRanks(alone, self.ranks, partial(GlobalGradients, layout=scored), most_passes)

    weighted_loss = staticmethod(weighted_loss)

    def prepare(self, loss: Tensor) -> None:
        """Let this loss's backward ask a DDP with ``static_graph=True`` to reduce.

        In its first iteration it does so at the end of backward: the nested pass asks too early.
        """
        replica: Any = None if self.static is None else self.static()
        if replica is None or replica._static_graph_delay_allreduce_enqueued:
            return
        if not replica.require_backward_grad_sync:
            raise RuntimeError(
                "the first backward pass of DistributedDataParallel(static_graph=True) is under "
                "no_sync(), which torch's reducer does not survive: leave one out"
            )

        def ask(_: Tensor) -> None:
            if not replica._static_graph_delay_allreduce_enqueued:
                replica._static_graph_delay_allreduce_enqueued = True
                at_the_end_of_backward(replica.reducer._delay_all_reduce)

        loss.register_hook(ask)

    def leaves_of(self, parameters: Iterable[Tensor]) -> set[Tensor]:
        return set(parameters)

    def check_reduced(self) -> None:
        if not self.synced:
            raise RuntimeError(
                "a logical batch ends before its last pass, and all that it has had ran under "
                "no_sync(): leave the last pass before step() out of it"
            )

    def release(self) -> None:
        self.model = self.watch = self.ranks = self.static = None


def _ddp_around(model: nn.Module) -> DistributedDataParallel | None:
    for known in gc.get_objects():
        # By its type: to ask some objects for their class is an import, or a warning.
        if issubclass(type(known), DistributedDataParallel) and model in set(known.modules()):
            return known  # type: ignore[no-any-return]
    return None


def replica_in(
    model: nn.Module, around: DistributedDataParallel | None = None
) -> DistributedDataParallel | None:
    """The DDP over several processes around the model, or in it."""
    if several_processes():
        for found in chain(filter(None, [around]), replicas_in(model)):
            if dist.get_world_size(found.process_group) > 1:
                return found
    return None


def replicas_in(model: nn.Module) -> Iterator[DistributedDataParallel]:
    return (m for m in model.modules() if isinstance(m, DistributedDataParallel))


def check_replica(replica: DistributedDataParallel) -> None:
    for name, module in replica.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise NotImplementedError(
                f"{name} is a SyncBatchNorm, which mixes samples of all processes: expected "
                "GroupNorm, LayerNorm or BatchNorm"
            )
    if replica._join_config.enable:
        raise NotImplementedError(
            "the model trains inside DistributedDataParallel.join(), which knows no collectives of "
            "weights: leave it out and give a process without data empty batches, "
            "criterion(model(x[:0]), y[:0]).backward()"
        )


def _note_caller(module: nn.Module, args: Any) -> None:
    active = DistributedDataParallel._get_active_ddp_module()
    if active is not None:
        _AROUND[module] = ref(active)
