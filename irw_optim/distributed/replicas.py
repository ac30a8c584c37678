"""Which DistributedDataParallel a model is in, and what that asks of a weighted loss.

DDP reduces what arrives at the parameters, which is the weighted gradient. Only it must know the
time: two of its modes wait for a signal on the way, and a nested backward pass gives it too early.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.attachments import Attachment, Removable, Renewed
from irw_optim.backward.weighted_loss import Weigher, weighted_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import GlobalGradients, Ranks
from irw_optim.distributed.weigher import OverRanks
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.torch_internals import at_the_end_of_backward, several_processes

logger = logging.getLogger("irw_optim")

_AROUND: WeakKeyDictionary[nn.Module, ref[DistributedDataParallel]] = WeakKeyDictionary()
"""The DDP that called a model last: a framework may wrap the model long after the optimizer."""

_TOLD: WeakSet[nn.Module] = WeakSet()
"""Models of which it was said already that they are in no DDP."""


class CallerNoted(Attachment):
    """Notes which DDP calls a model."""

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Attach, and yield what removes it."""
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            yield module.register_forward_pre_hook(_note_caller)


class Options(Protocol):
    """What several processes ask of an optimizer's options: they may change in mid-training."""

    @property
    def worst_off(self) -> str:
        """``"global"`` or ``"local"``."""

    @property
    def weighting(self) -> object:
        """A name, or a rule."""

    @property
    def accumulation_steps(self) -> int:
        """How many backward passes are weighed together."""

    def described(self) -> dict[str, Any]:
        """What has to be equal in all processes."""


class Replicas(Renewed):
    """What an optimizer knows of the processes that its model trains in.

    The model is watched, so that the DDP around it is found, whoever puts it there and when.
    """

    PASSING = ("watch", "ranks", "synced")

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.begin()
        if model is not None and model not in _AROUND and (found := _ddp_around(model)):
            _AROUND[model] = ref(found)

    def begin(self) -> None:
        """Watch the model, unless it is still being copied: `find` does so then."""
        whole = self.model is not None and "_modules" in vars(self.model)
        self.watch = CallerNoted.on(self.model) if whole else None  # type: ignore[arg-type]
        self.ranks: Ranks | None = None
        self.synced = True

    def find(self) -> DistributedDataParallel | None:
        """The DDP over several processes that the model is in, or that is in the model, checked."""
        if self.model is None or not several_processes():
            return None
        if self.watch is None:
            self.begin()
        around = _AROUND.get(self.model)
        found = replica_in(self.model, None if around is None else around())
        if found is not None:
            check_replica(found)
        return found

    def weigher(self, alone: Weigher, scored: Sequence[Tensor], options: Options) -> Weigher:
        """Who weighs the batch of all processes, or that of this one where each weighs its own."""
        replica, most_passes = self.find(), options.accumulation_steps
        if replica is None:
            if several_processes() and options.worst_off == "global":
                _say_that_there_is_none(self.model)
            return alone
        if replica.static_graph and most_passes > 1:
            raise NotImplementedError(
                f"accumulation_steps={most_passes} in DistributedDataParallel(static_graph=True): "
                "passes without a gradient of their own are no static graph; leave one of them out"
            )
        self.synced = replica.require_backward_grad_sync
        if options.worst_off == "local":
            return alone
        if self.ranks is None or self.ranks.group is not replica.process_group:
            self.ranks = Ranks(replica.process_group, options.described())
        return OverRanks(alone, self.ranks, partial(GlobalGradients, layout=scored), most_passes)

    def weighted_loss(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
    ) -> Tensor:
        """See `irw_optim.backward.weighted_loss`."""
        loss = weighted_loss(batch, captured, scored, weigher)
        replica = self.find()
        if replica is not None:
            prepare_static_graph(loss, replica)
        return loss

    def leaves_of(self, parameters: Iterable[Tensor]) -> set[Tensor]:
        """What autograd meets of these parameters."""
        return set(parameters)

    def check_reduced(self) -> None:
        """Raise where DDP would not reduce what is added to ``p.grad`` now."""
        if not self.synced:
            raise RuntimeError(
                "a logical batch ends before its last pass, and all that it has had ran under "
                "no_sync(): each process would keep a gradient of its own. Leave the last pass "
                "before step() out of no_sync()"
            )

    def release(self) -> None:
        """Watch the model no longer."""
        self.model = self.watch = self.ranks = None


def _ddp_around(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP that wraps a model already, where nobody has watched it being called."""
    for known in gc.get_objects():
        # By its type: to ask some objects for their class is an import, or a warning.
        if issubclass(type(known), DistributedDataParallel) and model in set(known.modules()):
            return known  # type: ignore[no-any-return]
    return None


def replica_in(
    model: nn.Module, around: DistributedDataParallel | None = None
) -> DistributedDataParallel | None:
    """The DDP over several processes that is known to be around the model, or in it."""
    if several_processes():
        for found in chain(filter(None, [around]), replicas_in(model)):
            if dist.get_world_size(found.process_group) > 1:
                return found
    return None


def replicas_in(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Every DDP that the model is, or that is in it."""
    return (m for m in model.modules() if isinstance(m, DistributedDataParallel))


def check_replica(replica: DistributedDataParallel) -> None:
    """Refuse batch statistics over processes, and a `join` of uneven inputs."""
    for name, module in replica.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise NotImplementedError(
                f"{name} is a SyncBatchNorm: a sample's gradient would run through the batches of "
                "all processes; use GroupNorm, LayerNorm or BatchNorm"
            )
    if replica._join_config.enable:
        raise NotImplementedError(
            "the model trains inside DistributedDataParallel.join(): a process without data would "
            "miss the collectives of the weights; leave join() out and give that process empty "
            "batches, criterion(model(x[:0]), y[:0]).backward()"
        )


def _say_that_there_is_none(model: nn.Module | None) -> None:
    if model is None or model in _TOLD:
        return
    _TOLD.add(model)
    logger.warning(
        "%d processes run, but the model is not in DistributedDataParallel: each process weighs "
        "its own batch. Wrap the model, or say worst_off='local' if that is meant",
        dist.get_world_size(),
    )


def prepare_static_graph(loss: Tensor, replica: DistributedDataParallel) -> None:
    """Tell a DDP with ``static_graph=True`` of the backward pass of this loss, when it runs.

    In its first iteration it reduces everything at the end of backward, which a node behind the
    model's output asks for: the nested pass would meet that node, and ends too early. So it is
    asked for here, where the outer pass begins, and that node is told so.
    """
    if not replica.static_graph or replica._static_graph_delay_allreduce_enqueued:
        return
    if not replica.require_backward_grad_sync:
        raise RuntimeError(
            "the first backward pass of DistributedDataParallel(static_graph=True) is under "
            "no_sync(), which torch's reducer does not survive: leave one of them out"
        )

    def ask(_: Tensor) -> None:
        if not replica._static_graph_delay_allreduce_enqueued:
            replica._static_graph_delay_allreduce_enqueued = True
            reducer: Any = replica.reducer
            at_the_end_of_backward(reducer._delay_all_reduce)

    loss.register_hook(ask)


def _note_caller(module: nn.Module, args: Any) -> None:
    active = DistributedDataParallel._get_active_ddp_module()
    if active is not None:
        _AROUND[module] = ref(active)
