"""FSDP2: an optimizer holds shards, and autograd meets the whole parameters of a group of layers.

FSDP gathers them at its output and frees them at its input, so every pass is one of autograd's own:
a nested one up to the layers' outputs, whose a and b give the scores without any parameter's value,
and the user's, which goes on with the weights.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from irw_optim.attachments import Renewed
from irw_optim.backward.weighted_loss import Weigher, deferred_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.torch_internals import is_shard, is_sharded, is_sharded_here

from .ranks import LayerwiseGradients, Ranks
from .replicas import Replicas
from .weigher import OverRanks, ShardedPass

TESTED_FROM = "2.13"  # of torch: FSDP's own tables are those that are read here


def groups_of(model: nn.Module) -> list[dict[Tensor, Tensor]]:
    """What FSDP gathers together, in order, {shard: whole parameter}, if it has been gathered."""
    states: list[Any] = [m._get_fsdp_state() for m in model.modules() if is_sharded_here(m)]  # type: ignore[operator]
    groups = dict.fromkeys(group for state in states for group in state._fsdp_param_groups)
    found = []
    for group in groups:
        pairs = ((p.sharded_param, getattr(p, "_unsharded_param", None)) for p in group.fsdp_params)
        found.append({shard: whole for shard, whole in pairs if whole is not None})
    return found


def names_of(model: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    """Of whole parameters; shapes for what is not the model's."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for group in groups_of(model):
        names |= {whole: names[shard] for shard, whole in group.items() if shard in names}
    return [names.get(p, f"a leaf of shape {tuple(p.shape)}") for p in parameters]


class Shards(Renewed):
    """What an optimizer knows of a model that passed `check_sharding`."""

    PASSING = ("_ranks",)

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model
        self.begin()

    def begin(self) -> None:
        self._ranks: Ranks | None = None

    def ranks(self, alike: Callable[[], dict[str, Any]] = dict) -> Ranks:
        if self._ranks is None:
            assert self.model is not None, "released"
            shard: Any = next(iter(groups_of(self.model)[0]))
            self._ranks = Ranks(shard.device_mesh.get_group(), alike())
        return self._ranks

    def columns(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        """The whole parameters, group by group, alike on all ranks."""
        chosen = set(parameters)
        groups = [] if self.model is None else groups_of(self.model)
        found = [[whole for shard, whole in group.items() if shard in chosen] for group in groups]
        return [group for group in found if group]

    def leaves_of(self, parameters: Iterable[Tensor]) -> set[Tensor]:
        chosen = set(parameters)
        return chosen.union(*self.columns(chosen))

    def weigher(
        self,
        alone: Weigher,
        scored: Sequence[Tensor],
        worst_off: str,
        most_passes: int,
        alike: Callable[[], dict[str, Any]],
    ) -> Weigher:
        if worst_off == "local":
            return alone
        over_groups = partial(LayerwiseGradients, groups=self.columns(scored))
        return OverRanks(alone, self.ranks(alike), over_groups)

    def weighted_loss(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
    ) -> Tensor:
        assert self.model is not None, "released"
        named = partial(names_of, self.model)
        if captured.others:
            raise NotImplementedError(
                f"the losses also lead to {', '.join(named(captured.others))}, no parameters of "
                "the model, whose gradient would be weighted: detach them, model(x.detach()), or "
                "use another criterion for them"
            )
        weighted = ShardedPass(batch, weigher, captured, scored, self.ranks(), named)
        return deferred_loss(batch.value, weighted, [captured.losses])

    def prepare(self, loss: Tensor) -> None:
        """Nothing: FSDP hears of every pass."""

    def check_reduced(self) -> None:
        """Nothing is added to ``p.grad`` behind FSDP's back."""

    def release(self) -> None:
        self.model = self._ranks = None


Processes = Replicas | Shards


def processes_of(model: nn.Module | None) -> Processes:
    if model is not None and is_sharded(model):
        return Shards(model)
    return Replicas(model)


def check_sharding(
    model: nn.Module | None,
    criterion: nn.Module | None,
    parameters: Iterable[Tensor],
    engine: object,
    weighting: object,
    accumulation_steps: int,
) -> None:
    """Refuse a sharded model, or options, whose gradients `fully_shard` would not reduce."""
    if model is None or not is_sharded(model):
        if any(map(is_shard, parameters)):
            raise NotImplementedError(
                "the optimizer holds DTensors, and model= is not sharded: expected one after "
                "fully_shard(model), not tensor parallelism"
            )
        return
    if torch.__version__ < TESTED_FROM:  # it compares as a version
        raise NotImplementedError(
            f"fully_shard with torch {torch.__version__}: expected torch {TESTED_FROM} or newer, "
            "or DistributedDataParallel"
        )
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise NotImplementedError(
                "model is in DistributedDataParallel and in fully_shard: expected one of them"
            )
        if is_sharded_here(module):
            module.reshard()  # type: ignore[operator]  # a forward leaves the outermost whole
    meshes = set()
    name: str
    p: Any
    for name, p in model.named_parameters():
        if not is_shard(p):
            if p.requires_grad:
                raise NotImplementedError(
                    f"{name} is not sharded, and FSDP would not reduce its gradient: expected "
                    "fully_shard(model) on the whole model, after its layers, before the optimizer"
                )
            continue
        if len(p.placements) != 1 or not p.placements[0].is_shard():
            raise NotImplementedError(
                f"{name} is placed as {p.placements}: expected fully_shard over one dimension, "
                "not HSDP or tensor parallelism"
            )
        meshes.add(p.device_mesh)
    if len(meshes) > 1:
        raise NotImplementedError(
            f"the parameters are sharded over {len(meshes)} meshes: expected one"
        )
    for name, p in () if criterion is None else criterion.named_parameters():
        if p.requires_grad and not is_shard(p):
            raise NotImplementedError(
                f"criterion has a parameter, {name}, that fully_shard does not reduce: expected it "
                "in the model, or frozen by requires_grad_(False)"
            )
    if engine == "autodiff":
        raise NotImplementedError(
            "engine='autodiff' under fully_shard needs all parameters at once: expected 'auto', or "
            "DistributedDataParallel"
        )
    if not isinstance(weighting, str) and getattr(weighting, "needs_gradients", True):
        raise NotImplementedError(
            f"{weighting=} under fully_shard: a rule of one's own may ask for sums as large as the "
            "model: expected a named one, or one with needs_gradients=False"
        )
    if accumulation_steps != 1:
        raise NotImplementedError(
            f"{accumulation_steps=} under fully_shard: each pass would keep its graph; expected "
            "1, with which passes are weighed by themselves and add up"
        )
