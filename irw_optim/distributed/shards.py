"""FSDP2: parameters that are whole one layer at a time, and only while a pass goes through it.

What an optimizer holds are shards; what autograd meets are the whole parameters that FSDP gathers
for a layer and frees after it. `fully_shard` puts layers into groups that it gathers together:
they are the unit of everything here, so that no process holds more of P numbers than FSDP does.

FSDP listens to autograd: at a module's output it gathers the parameters, at its input it reduces
their gradients and frees them. So every pass has to be one of autograd's own. The first is nested
and ends at the layers' outputs; with the a and b of all layers the scores need no parameter's
value. The second is the user's, which goes on with the weights as the gradient of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from irw_optim.attachments import Renewed
from irw_optim.backward.weighted_loss import Weigher, deferred_loss, seed_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.distributed.replicas import Options, Replicas
from irw_optim.distributed.sharding import groups_of, names_of
from irw_optim.distributed.weigher import FactorsOfLosses, OverRanks
from irw_optim.gradients.coverage import Covering
from irw_optim.gradients.ghost import GhostGradients, ghost_gradients
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.verification import Difference, differences, probe_of, wrong_among
from irw_optim.processes import is_sharded
from irw_optim.torch_internals import gradients_at

WAY_OUT = (
    "choose score_parameters= without them (score_parameters='last' for the last layer), or train "
    "with DistributedDataParallel, where autodiff takes them"
)


class ShardedPass(FactorsOfLosses):
    """The backward pass of one batch, of which all ranks have their part.

    Raises:
        NotImplementedError: inputs that require a gradient, which would be a weighted one.
    """

    captured: LossGradients

    def __init__(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
        model: nn.Module,
        ranks: Ranks,
    ) -> None:
        if captured.others:
            raise NotImplementedError(
                f"the losses also lead to {', '.join(names_of(captured.others, model))}, which are "
                "no parameters of the model: under fully_shard their gradient would be the "
                "weighted one. Detach them, model(x.detach()), or take their gradient from a "
                "criterion that is not attached"
            )
        super().__init__(batch, weigher)
        self.captured = captured
        self.scored = scored
        self.model = model
        self.ranks = ranks

    def rows(self, upstream: Tensor) -> GhostGradients:
        """G of this rank, from a pass that all ranks make alike."""
        batch, columns = self.captured, {p for p in self.captured.leaves if self.scored(p)}
        if not columns:
            raise RuntimeError(
                "the losses do not depend on any parameter that makes the scores: expected losses "
                "computed from the model, and score_parameters among its trainable parameters"
            )
        covering, check = self._agree(columns)
        losses, seed = batch.losses, seed_of(upstream, self.batch)
        sites = [s for s in batch.graph.sites if columns.intersection(s.call.parameters.values())]
        for site in sites:
            site.call.forget_values()
        if len(losses):
            rows = ghost_gradients(losses, sites, seed, retain_graph=True).restricted_to(columns)
        else:  # this rank goes along, since the others need its shards
            edges = [site.edge for site in sites]
            gradients_at(losses, edges, torch.ones_like(losses), retain_graph=True)
            rows = GhostGradients([], 0, seed)
        if check:
            self._check(rows, columns)
            if covering is not None:
                covering.agree()
        return rows

    def _agree(self, columns: set[Tensor]) -> tuple[Covering | None, bool]:
        """What is known of the products of this rank's batch, if it has one, and whether to check.

        All ranks check where one has to, and refuse what one does not cover: an all-gather of 2.
        """
        batch = self.captured
        missing: set[Tensor] = set()
        covering, due = None, False
        if len(batch.losses):
            covering = batch.engine.covering(batch, sharded=True)
            missing, due = columns - covering.covered, self.captured.engine.check_is_due(covering)
        told = self.ranks.each(batch.losses.new_tensor([bool(missing), due]))
        anything_missing, check = told.amax(0).tolist()
        if anything_missing:
            raise NotImplementedError(
                "under fully_shard the scores need parameters that the ghost products cover, and "
                f"they do not cover {self._of_all_ranks(missing)}: {WAY_OUT}"
            )
        return covering, bool(check)

    def _check(self, rows: GhostGradients, columns: set[Tensor]) -> None:
        """Compare the products with autograd's own gradients, each layer's as it arrives."""
        losses = self.captured.losses
        probe = probe_of(losses, self.captured.engine.random)
        found: dict[Tensor, Difference] = {}

        def compare(leaf: Tensor) -> None:
            truth = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            claim = rows.restricted_to({leaf}).combine(probe).get(leaf)
            (found[leaf],) = differences([leaf], [truth], [claim], rows)
            leaf.grad = None

        with ExitStack() as undo:
            for leaf in columns:
                undo.callback(setattr, leaf, "grad", leaf.grad)
                leaf.grad = None
                undo.callback(leaf.register_post_accumulate_grad_hook(compare).remove)
            torch.autograd.backward(losses, probe, retain_graph=True, inputs=list(columns))
            for leaf in columns - found.keys():  # autograd has none
                compare(leaf)
        names = self._of_all_ranks(wrong_among(list(found.values())))
        if names:
            raise RuntimeError(
                f"the ghost products differ from autograd for {names}: the forward mixes samples "
                "or uses these parameters outside their layers, and under fully_shard nothing else "
                f"makes scores; {WAY_OUT}"
            )

    def _of_all_ranks(self, parameters: Iterable[Tensor]) -> str:
        told = self.ranks.objects(names_of(parameters, self.model))
        return ", ".join(sorted({name for names in told for name in names}))


class Shards(Renewed):
    """What an optimizer knows of a model that passed `check_sharding`."""

    PASSING = ("_ranks",)

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model
        self.begin()

    def begin(self) -> None:
        """Know the process group when it is asked for."""
        self._ranks: Ranks | None = None

    def ranks(self, options: Options | None = None) -> Ranks:
        """The processes that the parameters are sharded over; the first to ask compares options."""
        if self._ranks is None:
            assert self.model is not None, "released"
            shard: Any = next(iter(groups_of(self.model)[0]))
            to_compare = None if options is None else options.described()
            self._ranks = Ranks(shard.device_mesh.get_group(), to_compare)
        return self._ranks

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

    def weigher(self, alone: Weigher, scored: Sequence[Tensor], options: Options) -> Weigher:
        """Who weighs the batch of all processes, or that of this one where each weighs its own."""
        if options.worst_off == "local":
            return alone
        groups = self.columns(scored)
        layout = [p for group in groups for p in group]
        return OverRanks(alone, self.ranks(options), layout, groups=groups)

    def weighted_loss(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
    ) -> Tensor:
        """The criterion's value, whose gradient is ``sum_i c_i grad(loss_i)``."""
        assert self.model is not None, "released"
        weighted = ShardedPass(batch, captured, scored, weigher, self.model, self.ranks())
        return deferred_loss(batch.value, weighted, [captured.losses])

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
