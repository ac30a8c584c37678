"""What a backward pass leaves for the private optimizer: the losses, and the gradients' rows.

Where a forward mixes samples (``h - h.mean(0)``), no guarantee holds. So rows are compared with
plain autograd at every batch in whose graph samples may meet, else at batches 1, 2, 4, 8, ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from irw_optim.arguments import DPGuaranteeError
from irw_optim.backward.weighted_loss import Deferred, deferred_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.criterion.attached import AttachedCriterion
from irw_optim.gradients.coverage import compare, probe_of
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.graph import walk
from irw_optim.gradients.layers import FIRST
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.magnitudes import row_norms
from irw_optim.gradients.mixing import follow_batch
from irw_optim.gradients.protocol import Direction, MaterializedGradients, as_matrix
from irw_optim.torch_internals import will_run
from irw_optim.weighting.weights import check_losses

_ONE_PASS = (
    "a sample could be counted twice. Call step() and zero_grad() after each backward, use "
    "BatchMemoryManager for large batches"
)


class GradSampleRows(MaterializedGradients):
    """``p.grad_sample`` as Opacus' hooks leave it, in float32 or better."""

    def norms(self) -> Tensor:
        """|g_i| over all parameters, (B,)."""
        squares = [as_matrix(block).square().sum(1) for block in self.rows.values()]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum(0).sqrt()

    def without(self, dropped: Tensor) -> "GradSampleRows":
        """With zero rows where `dropped`, (B,) bool."""
        zeroed = {
            p: r.reshape(len(r), -1).masked_fill(dropped.to(r.device)[:, None], 0.0).view_as(r)
            for p, r in self.rows.items()
        }
        return GradSampleRows(zeroed)

    @classmethod
    def read(cls, parameters: Sequence[Tensor], batch_size: int) -> "GradSampleRows":
        """Those of one pass, which a batch of no samples may come without."""
        rows: dict[Tensor, Tensor] = {}
        for p in parameters:
            which, block = f"a parameter of shape {tuple(p.shape)}", getattr(p, "grad_sample", None)
            if isinstance(block, list):
                if len(block) > 1:
                    raise DPGuaranteeError(
                        f"grad_sample holds {len(block)} backward passes: {_ONE_PASS}"
                    )
                block = block[0] if block else None
            if block is None and batch_size == 0:
                block = p.detach().new_zeros((0, *p.shape))
            if block is None:
                raise ValueError(
                    f"{which} has no grad_sample: call backward before step, and after every "
                    "forward in train mode; the model must go through IRWPrivacyEngine."
                    "make_private; freeze (requires_grad_(False)) parameters that the loss does "
                    "not use"
                )
            if len(block) != batch_size:
                raise DPGuaranteeError(
                    f"losses has {batch_size} samples but {which} has {len(block)} per-sample "
                    "gradients: expected one loss per sample, in the order of the batch, and a "
                    "model that keeps it in dimension 0"
                )
            if hasattr(block, "_processed"):
                raise DPGuaranteeError(
                    "these gradients were stepped on already: call optimizer.zero_grad() after "
                    "every step"
                )
            rows[p] = block.to(torch.promote_types(block.dtype, torch.float32))
        return cls(rows)


class GhostRows(GhostGradients):
    """Ghost products with norms, of which any row can be dropped; seed: 1 / the losses' factor."""

    norms = row_norms

    def dot(self, direction: Direction) -> Tensor:
        return super().dot(direction) if direction else self.seed.new_zeros(self.batch_size)

    def without(self, dropped: Tensor) -> "GhostRows":
        return GhostRows([c.without(dropped) for c in self.calls], self.batch_size, self.seed)


ClippableGradients = GradSampleRows | GhostRows


class PendingBatch:
    """The batch that went backward since the last step, with Opacus' ``grad_sample``."""

    def __init__(self, loss_reduction: str) -> None:
        self.arrived: list[tuple[Tensor, Any]] = []  # of each pass, losses and what is theirs
        self._averaged = loss_reduction == "mean"
        self._attached: AttachedCriterion | None = None
        self._hooks: Any = None
        self._random = torch.Generator().manual_seed(0)
        self._batches = 0

    def follow(self, criterion: nn.Module, model: nn.Module, hooks: Any = None) -> None:
        """Let `criterion`, called while `model` trains, leave its losses here."""
        if isinstance(earlier := follower_of(criterion), PendingBatch):
            earlier.unfollow()  # a new training with the same criterion
        self._attached = AttachedCriterion(criterion, model, self._hand_out)
        self._hooks = hooks

    def unfollow(self) -> None:
        """Leave the criterion as it was."""
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def _hand_out(self, batch: PerSampleLosses) -> Tensor:
        """The scalar for the loop, whose backward notes the losses."""
        losses = batch.losses
        if not losses.requires_grad:
            return batch.value
        check = self._hooks and self._comparison(losses)  # Opacus' hooks do not see it

        def arrive(gradient: Tensor) -> None:
            scale = gradient * len(losses) if self._averaged else gradient
            self.arrived.append((losses.detach(), check and partial(check, scale)))

        losses.register_hook(arrive)
        # Of the losses alone: torch's mean divides by class weights, which the whole batch decides.
        reduced = losses.mean() if self._averaged else losses.sum()
        return batch.value + (reduced - reduced.detach())

    def _comparison(self, losses: Tensor) -> Callable[[Tensor, GradSampleRows], None] | None:
        """If it is time, what compares rows with autograd, by the factors on the losses."""
        if len(losses) < 2:
            return None
        batch = follow_batch(losses, walk(losses))
        self._batches += 1
        seldom = self._batches & (self._batches - 1) == 0
        if batch.mixed_by is None and not batch.computes_shared and not seldom:
            return None
        probe = probe_of(losses, self._random)
        parameters = [p for p in self._hooks._module.parameters() if p.requires_grad]
        self._hooks.disable_hooks()
        try:
            gradients = torch.autograd.grad(
                losses, parameters, probe, retain_graph=True, allow_unused=True
            )
        finally:
            self._hooks.enable_hooks()
        truth = dict(zip(parameters, gradients, strict=True))

        def check(scale: Tensor, rows: GradSampleRows) -> None:
            covered = [p for p in truth if p in rows.rows]
            theirs = [truth[p] for p in covered]
            if scale.all() and (wrong := compare(covered, theirs, probe / scale, rows)):
                raise DPGuaranteeError(
                    "the per-sample gradients differ from autograd's by "
                    f"{max(wrong.values()):.2g} of the gradient: the forward mixes samples, or "
                    "uses parameters outside their layers. Use layers that treat each sample alone"
                )

        return check

    def losses(self, given: Tensor | None = None) -> Tensor:
        """Those of this backward pass, (B,), or ``given``."""
        if given is not None:
            try:
                check_losses(given)
            except (TypeError, ValueError) as error:
                raise DPGuaranteeError(str(error)) from None
            return given.detach()
        if not self.arrived:
            raise DPGuaranteeError(
                "losses are missing: give make_private(criterion=criterion) and call that one "
                "in training mode, or call optimizer.step(losses=losses) with losses of shape (B,)"
            )
        if len(self.arrived) > 1:
            raise DPGuaranteeError(
                f"{len(self.arrived)} backward passes since the last step: {_ONE_PASS}, and for a "
                "sum of criteria optimizer.step(losses=...) with the summed per-sample losses"
            )
        return self.arrived[0][0]

    def rows(self, parameters: Sequence[Tensor], batch_size: int) -> ClippableGradients:
        """The per-sample gradients of the same pass, as of plain autograd."""
        rows = GradSampleRows.read(parameters, batch_size)
        if self.arrived and (check := self.arrived[-1][1]):
            check(rows)
        return rows


class GhostBatch(PendingBatch):
    """One without rows, of layers' inputs and output gradients; row i would be that of loss i."""

    def __init__(self, loss_reduction: str, model: nn.Module) -> None:
        super().__init__(loss_reduction)
        self._engine = Engine(model, "auto")
        self._engine.add_layer_hooks()  # a batch of one sample does not show where the batch is

    def unfollow(self) -> None:
        """Leave criterion and model as they were."""
        super().unfollow()
        self._engine.remove_hooks()

    def rows(self, parameters: Sequence[Tensor], batch_size: int) -> ClippableGradients:
        """Those of the one backward pass, if it is that of the losses."""
        rows: GhostRows | None = self.arrived[0][1] if len(self.arrived) == 1 else None
        if rows is None and batch_size == 0:
            return GradSampleRows.read(parameters, 0)
        if rows is None or rows.batch_size != batch_size:
            raise DPGuaranteeError(
                f"losses has {batch_size} samples, but {len(self.arrived)} backward passes ran "
                "since the last step, or one of another size: in ghost mode call the criterion "
                "of make_private, backward, and step() without losses"
            )
        return rows

    def _hand_out(self, batch: PerSampleLosses) -> Tensor:
        if not batch.losses.requires_grad:
            return batch.value
        captured = LossGradients(self._engine, batch.losses) if len(batch.losses) else None
        anchor = torch.zeros_like(batch.value, requires_grad=True)  # something to go backward to
        arrival = _Arrival(ref(self), batch.losses.detach(), captured)
        return deferred_loss(batch.value, arrival, [anchor])

    def rows_of(self, captured: LossGradients, upstream: Tensor) -> GhostRows:
        """Run the engine behind the losses, where it covers all."""
        if any(map(will_run, captured.graph.order)):
            raise NotImplementedError(
                "grad_sample_mode='ghost': another term of the loss uses the same outputs, and "
                "would not be clipped; put it into the criterion (a PerSampleLoss), or use "
                "grad_sample_mode='hooks'"
            )
        batch_size = len(captured.losses)
        captured.start(torch.ones_like(upstream), keep_graph=False)
        uncovered = set(captured.uncovered)
        for call, _, shape, _ in captured.graph.sites:
            # A folded batch, or one that does not stand first, must be proven by the graph: a
            # guess by a Poisson batch's size may be wrong, and would mix samples.
            first = shape[:1] == (batch_size,) and call.layout == FIRST
            if not (captured.apart and call.layout is not None) and not first:
                uncovered.update(call.parameters.values())
        if uncovered or captured.ghost is None:
            raise NotImplementedError(
                f"grad_sample_mode='ghost' does not cover {self._engine.names_of(uncovered)}: "
                "expected layers linear in their parameters that keep the batch in dimension 0, "
                "and a forward that does not mix samples; use grad_sample_mode='hooks'"
            )
        return GhostRows(captured.ghost.calls, batch_size, 1 / upstream)


@dataclass(eq=False)
class _Arrival(Deferred):
    ALREADY_PASSED = "this loss went backward already: one backward pass, one step"
    ERROR = DPGuaranteeError

    pending: ref[GhostBatch]  # the loss may outlive the training
    losses: Tensor
    captured: LossGradients | None  # None for a batch of no samples

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Nothing goes on: the private step makes the gradient."""
        self.passed = True  # also where the graph is kept
        try:
            if (pending := self.pending()) is not None:
                rows = self.captured and pending.rows_of(self.captured, upstream)
                pending.arrived.append((self.losses, rows))
        finally:
            self.leave()
        return [None]

    def leave(self) -> None:
        super().leave()
        self.captured = None


def follower_of(criterion: nn.Module) -> object | None:
    """Whoever is handed its losses, if anybody still is."""
    attached = AttachedCriterion.found_on(criterion)
    return getattr(attached and attached.listener(), "__self__", None)
