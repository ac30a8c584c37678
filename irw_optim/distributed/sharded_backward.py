"""A backward pass of FSDP in two: one to the layers, which weighs, and the ordinary one after it.

FSDP listens to autograd: at a module's output it gathers the parameters, at its input it reduces
their gradients and frees them. So every pass has to be one of autograd's own. The first is nested
and ends at the layers' outputs; with the a and b of all layers the scores need no parameter's
value. The second is the user's, which goes on with the weights as the gradient of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass
from irw_optim.backward.weighted_loss import BatchPass, Weigher, deferred_loss, seed_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.coverage import Covering
from irw_optim.gradients.ghost import GhostGradients, ghost_gradients
from irw_optim.gradients.graph import CallSite
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.verification import Difference, differences, probe_of, wrong_among

WAY_OUT = (
    "choose score_parameters= without them (score_parameters='last' for the last layer), or train "
    "with DistributedDataParallel, where autodiff takes them"
)


class Sharded(Protocol):
    """What is known of the model that the losses come from."""

    @property
    def ranks(self) -> Ranks:
        """Who takes part in every pass."""

    def names_of(self, parameters: Iterable[Tensor]) -> list[str]:
        """Names of leaves."""


def sharded_loss(
    batch: PerSampleLosses,
    captured: LossGradients,
    scored: Callable[[Tensor], bool],
    weigher: Weigher,
    model: Sharded,
) -> Tensor:
    """The criterion's value, whose gradient is ``sum_i c_i grad(loss_i)``.

    Args:
        batch: the per-sample losses, detached.
        captured: their gradients.
        scored: which leaves' gradients make the score.
        weigher: chooses the factors c, from what arrives at the scalar and the rows.
        model: what the losses come from.

    Raises:
        NotImplementedError: inputs that require a gradient, which would be a weighted one.
    """
    if captured.others:
        raise NotImplementedError(
            "the losses also lead to "
            f"{', '.join(model.names_of(captured.others))}, which are no parameters of the model: "
            "under fully_shard their gradient would be the weighted one. Detach them, "
            "model(x.detach()), or take their gradient from a criterion that is not attached"
        )
    deferred = _ShardedPass(batch, captured, scored, weigher, model)
    return deferred_loss(batch.value, deferred, [captured.losses])


class _ShardedPass(BatchPass):
    """Behind a node between losses and scalar, which hands the losses their factors."""

    def __init__(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
        model: Sharded,
    ) -> None:
        super().__init__(batch, captured, scored, weigher)
        self.model = model

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """The factor of every loss, for the gradient ``upstream`` of the scalar loss."""
        rows = self._rows(seed_of(upstream, self.batch))
        factors = self.weigher.coefficients([Pass(self.batch, upstream)], rows)
        return [factors.to(self.captured.losses.dtype)]

    def _rows(self, seed: Tensor) -> GhostGradients:
        """G of this rank, from a pass that all ranks make alike."""
        batch, columns = self.captured, {p for p in self.captured.leaves if self.scored(p)}
        if not columns:
            raise RuntimeError(
                "the losses do not depend on any parameter that makes the scores: expected losses "
                "computed from the model, and score_parameters among its trainable parameters"
            )
        covering, check = self._agree(columns)
        sites = [s for s in batch.graph.sites if columns.intersection(s.call.parameters.values())]
        for site in sites:
            site.call.forget_values()
        if not len(batch.losses):
            rows = _no_rows(batch.losses, sites, seed)
        else:
            rows = ghost_gradients(batch.losses, sites, seed, retain_graph=True)
            rows = rows.restricted_to(columns)
        if check:
            self._check(rows, columns)
            if covering is not None:
                covering.agree()
        return rows

    def _agree(self, columns: set[Tensor]) -> tuple[Covering | None, bool]:
        """What is known of the products of this rank's batch, if it has one, and whether to check.

        They are checked where any rank has to: an all-gather of 2 numbers.

        Raises:
            NotImplementedError: parameters that the ghost products do not cover, on any rank.
        """
        batch = self.captured
        missing: set[Tensor] = set()
        covering, due = None, False
        if len(batch.losses):
            covering = batch.engine.covering(batch, sharded=True)
            missing, due = columns - covering.covered, batch.engine.check_is_due(covering)
        told = self.model.ranks.each(batch.losses.new_tensor([bool(missing), due]))
        anything_missing, check = told.amax(0).tolist()
        if anything_missing:
            raise NotImplementedError(
                "under fully_shard the scores need parameters that the ghost products cover, and "
                f"they do not cover {self._of_all_ranks(missing)}: {WAY_OUT}"
            )
        return covering, bool(check)

    def _check(self, rows: GhostGradients, columns: set[Tensor]) -> None:
        """Compare the products with autograd's own gradients, each layer's as it arrives.

        Raises:
            RuntimeError: they differ, on any rank.
        """
        losses = self.captured.losses
        comparison = _Comparison(rows, probe_of(losses, self.captured.engine.random))
        with _seeing(columns, comparison):
            torch.autograd.backward(
                losses, comparison.probe, retain_graph=True, inputs=list(columns)
            )
        wrong = comparison.wrong(columns)
        names = self._of_all_ranks(wrong)
        if names:
            raise RuntimeError(
                f"the ghost products differ from autograd for {names}: the forward mixes samples "
                "or uses these parameters outside their layers, and under fully_shard nothing else "
                f"makes scores; {WAY_OUT}"
            )

    def _of_all_ranks(self, parameters: Iterable[Tensor]) -> str:
        """Names of the parameters that are meant on any rank."""
        told = self.model.ranks.objects(self.model.names_of(parameters))
        return ", ".join(sorted({name for names in told for name in names}))


class _Comparison:
    """Looks at each leaf's gradient once, for one probe."""

    def __init__(self, rows: GhostGradients, probe: Tensor) -> None:
        self.rows = rows
        self.probe = probe
        self.found: dict[Tensor, Difference] = {}

    def __call__(self, leaf: Tensor, truth: Tensor) -> None:
        claim = self.rows.restricted_to({leaf}).combine(self.probe).get(leaf)
        self.found[leaf] = differences([leaf], [truth], [claim], self.rows)[0]

    def wrong(self, leaves: set[Tensor]) -> dict[Tensor, float]:
        for leaf in leaves - self.found.keys():
            self(leaf, torch.zeros_like(leaf))  # autograd has none
        return wrong_among(list(self.found.values()))


def _no_rows(losses: Tensor, sites: Sequence[CallSite], seed: Tensor) -> GhostGradients:
    """Of a rank without samples: it goes along, since the others need its shards."""
    torch.autograd.grad(
        losses,
        [site.edge for site in sites],
        torch.ones_like(losses),
        retain_graph=True,
        allow_unused=True,
    )
    return GhostGradients([], 0, seed)


@contextmanager
def _seeing(leaves: set[Tensor], see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Shows each leaf's gradient when it arrives, and lets none of them stay."""

    def hook(leaf: Tensor) -> None:
        assert leaf.grad is not None, "it has just arrived"
        see(leaf, leaf.grad)
        leaf.grad = None

    before = {leaf: leaf.grad for leaf in leaves}
    for leaf in leaves:
        leaf.grad = None
    handles = [leaf.register_post_accumulate_grad_hook(hook) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for leaf, gradient in before.items():
            leaf.grad = gradient
