"""What a backward pass leaves for the private optimizer: the losses, and the gradients' rows.

Where a forward mixes the samples of the batch (``h - h.mean(0)``), what is clipped as one sample's
gradient carries others, and no guarantee holds. The graph of the losses shows whether any operation
can; plain autograd, for a random vector r, whether G^T r is what the rows say: at every batch where
samples may meet, else at batches 1, 2, 4, 8, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from irw_optim.criterion import PerSampleLosses
from irw_optim.criterion.attached import AttachedCriterion
from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.coverage import compare, probe_of
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.graph import walk
from irw_optim.gradients.mixing import follow_batch
from irw_optim.gradients.norms import row_norms
from irw_optim.gradients.protocol import Direction, MaterializedGradients, as_matrix

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

    def without(self, dropped: Tensor) -> GradSampleRows:
        """The same gradients with zero rows where `dropped` (B,) bool."""
        zeroed = {
            p: r.reshape(len(r), -1).masked_fill(dropped.to(r.device)[:, None], 0.0).view_as(r)
            for p, r in self.rows.items()
        }
        return GradSampleRows(zeroed)

    @classmethod
    def read(cls, parameters: Sequence[Tensor], batch_size: int) -> GradSampleRows:
        """One backward pass of `batch_size` samples, out of the parameters' ``grad_sample``.

        A batch of no samples may come without one: many models cannot be run on it.
        """
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
                    f"{which} has no grad_sample: call backward before step; the model must go "
                    "through IRWPrivacyEngine.make_private, or be an opacus GradSampleModule; "
                    "freeze (requires_grad_(False)) parameters that the loss does not use"
                )
            if len(block) != batch_size:
                raise DPGuaranteeError(
                    f"losses has {batch_size} samples but {which} has {len(block)} per-sample "
                    "gradients: expected one loss per sample of the batch, in its order, and a "
                    "model that keeps the batch in dimension 0"
                )
            if hasattr(block, "_processed"):
                raise DPGuaranteeError(
                    "these gradients were stepped on already: call optimizer.zero_grad() after "
                    "every step, so that no sample is counted twice"
                )
            rows[p] = block.to(torch.promote_types(block.dtype, torch.float32))
        return cls(rows)


class GhostRows(GhostGradients):
    """Ghost products with norms, of which any row can be dropped; seed: 1 / the losses' factor."""

    def norms(self) -> Tensor:
        """|g_i| over all parameters, (B,)."""
        return row_norms(self)

    def dot(self, direction: Direction) -> Tensor:
        """<g_i, v>, (B,)."""
        return super().dot(direction) if direction else self.seed.new_zeros(self.batch_size)

    def without(self, dropped: Tensor) -> GhostRows:
        """The same gradients with zero rows where `dropped` (B,) bool."""
        calls = [call.without(dropped) for call in self.calls]
        return GhostRows(calls, self.batch_size, self.seed)


ClippableGradients = GradSampleRows | GhostRows


class SpotCheck:
    """Compares a random combination of a batch's rows with autograd, unseen by Opacus' hooks."""

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks
        self.random = torch.Generator().manual_seed(0)
        self.batches = 0

    def look(self, losses: Tensor) -> Callable[[Tensor, GradSampleRows], None] | None:
        """Take the gradient of a combination of losses (B,), if it is time; their graph stays.

        What is given back raises a DPGuaranteeError unless the rows of the batch are autograd's;
        before them it takes what the training loop multiplied the losses with, (B,).
        """
        if len(losses) < 2:
            return None  # nobody to mix with
        batch = follow_batch(losses, walk(losses))
        self.batches += 1
        seldom = self.batches & (self.batches - 1) == 0
        if batch.mixed_by is None and not batch.computes_shared and not seldom:
            return None
        probe = probe_of(losses, self.random)
        parameters = [p for p in self.hooks._module.parameters() if p.requires_grad]
        self.hooks.disable_hooks()
        try:
            gradients = torch.autograd.grad(
                losses, parameters, probe, retain_graph=True, allow_unused=True
            )
        finally:
            self.hooks.enable_hooks()
        truth = dict(zip(parameters, gradients, strict=True))

        def check(scale: Tensor, rows: GradSampleRows) -> None:
            if not bool(scale.all()):
                return
            covered = [p for p in truth if p in rows.rows]
            wrong = compare(covered, [truth[p] for p in covered], probe / scale, rows)
            if wrong:
                raise DPGuaranteeError(
                    "the per-sample gradients differ from autograd's by "
                    f"{max(wrong.values()):.2g} of the gradient: the forward mixes the samples of "
                    "a batch, or uses parameters outside their layers. Use layers that treat each "
                    "sample alone"
                )

        return check


class PendingBatch:
    """The batch whose backward pass has run since the last step, with Opacus' ``grad_sample``.

    A loss counts once its backward has run: one that is only looked at does not.
    """

    def __init__(self, loss_reduction: str = "mean") -> None:
        self._arrived: list[tuple[Tensor, Any]] = []  # of each pass, losses and what is theirs
        self._reduction = loss_reduction
        self._attached: AttachedCriterion | None = None
        self._spot_check: SpotCheck | None = None

    def follow(self, criterion: nn.Module, model: nn.Module, hooks: Any = None) -> None:
        """Let `criterion`, called while `model` trains, leave its losses here; in place.

        What it returns keeps its value, and has the gradient of the mean (or sum) of the per-sample
        losses: torch's own may divide by what the whole batch decides, such as class weights. With
        Opacus' GradSampleHooks, rows are compared with plain autograd.
        """
        if isinstance(earlier := follower_of(criterion), PendingBatch):
            earlier.unfollow()  # a new training with the same criterion
        self._attached = AttachedCriterion(criterion, model, self._hand_out)
        self._spot_check = None if hooks is None else SpotCheck(hooks)

    def unfollow(self) -> None:
        """Leave the criterion as it was."""
        if self._attached is not None:
            self._attached.remove()
            self._attached = None

    def _hand_out(self, batch: PerSampleLosses) -> Tensor:
        """The scalar that the training loop sees; its backward notes the losses."""
        losses = batch.losses
        if not losses.requires_grad:
            return batch.value
        check = self._spot_check and self._spot_check.look(losses)
        averaged = self._reduction == "mean"

        def arrive(gradient: Tensor) -> None:
            scale = gradient * len(losses) if averaged else gradient
            self._arrived.append((losses.detach(), check and partial(check, scale)))

        losses.register_hook(arrive)
        reduced = losses.mean() if averaged else losses.sum()
        return batch.value + (reduced - reduced.detach())

    def clear(self) -> None:
        """Forget the losses whose gradients were thrown away."""
        self._arrived.clear()

    def losses(self, given: Tensor | None = None) -> Tensor:
        """The losses of this backward pass, (B,), or those ``given``; they stay until `clear`."""
        if given is not None:
            expected = "expected a floating-point tensor of shape (B,), one loss per sample"
            if not isinstance(given, Tensor):
                raise DPGuaranteeError(f"losses={given!r}: {expected}")
            if given.ndim != 1 or not given.is_floating_point():
                raise DPGuaranteeError(
                    f"losses has shape {tuple(given.shape)} and dtype {given.dtype}: {expected}, "
                    'as from F.cross_entropy(output, target, reduction="none")'
                )
            return given.detach()
        if not self._arrived:
            raise DPGuaranteeError(
                "losses are missing: give make_private(criterion=criterion) and call that one "
                "in training mode, or call optimizer.step(losses=losses) with losses of shape (B,)"
            )
        if len(self._arrived) > 1:
            raise DPGuaranteeError(
                f"{len(self._arrived)} backward passes since the last step: {_ONE_PASS}, and for a "
                "sum of criteria optimizer.step(losses=...) with the summed per-sample losses"
            )
        return self._arrived[0][0]

    def rows(self, parameters: Sequence[Tensor], batch_size: int) -> ClippableGradients:
        """The per-sample gradients of the same backward pass, which are those of plain autograd."""
        rows = GradSampleRows.read(parameters, batch_size)
        if self._arrived and (check := self._arrived[-1][1]):
            check(rows)
        return rows


def follower_of(criterion: nn.Module) -> object | None:
    """Whoever is handed the losses of this criterion, if anybody still is."""
    attached = AttachedCriterion.found_on(criterion)
    listener = None if attached is None else attached.listener()
    return getattr(listener, "__self__", None)
