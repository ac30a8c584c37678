"""What a backward pass leaves for the private optimizer: the losses, and the gradients' rows.

Where a forward mixes the samples of the batch (``h - h.mean(0)``), what is clipped as one sample's
gradient carries others, and no guarantee holds. The graph of the losses shows whether any operation
can; plain autograd, for a random vector r, whether G^T r is what the rows say: at every batch where
samples may meet, else at batches 1, 2, 4, 8, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from irw_optim.criterion import PerSampleLosses
from irw_optim.criterion.attached import AttachedCriterion
from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.graph import walk
from irw_optim.gradients.materialized import MaterializedGradients, as_matrix
from irw_optim.gradients.mixing import follow_batch
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.gradients.verification import compare, probe_of


class ClippableGradients(PerSampleGradients, Protocol):
    """What the private optimizer asks of an engine beyond the three products."""

    def norms(self) -> Tensor:
        """|g_i| over all parameters, (B,)."""

    def without(self, dropped: Tensor) -> ClippableGradients:
        """The same gradients with zero rows where `dropped` (B,) bool: 0 times NaN is NaN."""


class GradSampleRows(MaterializedGradients):
    """``p.grad_sample`` as Opacus' hooks leave it, in float32 or better."""

    def norms(self) -> Tensor:
        """|g_i| over all parameters, (B,)."""
        squares = [as_matrix(block).square().sum(1) for block in self.rows.values()]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum(0).sqrt()

    def without(self, dropped: Tensor) -> GradSampleRows:
        """The same gradients with zero rows where `dropped` (B,) bool."""

        def kept(block: Tensor) -> Tensor:
            column = dropped.to(block.device).view(-1, *(1,) * (block.ndim - 1))
            return block.masked_fill(column, 0.0)

        return GradSampleRows({p: kept(block) for p, block in self.rows.items()})

    @classmethod
    def read(cls, parameters: Sequence[Tensor], batch_size: int) -> GradSampleRows:
        """One backward pass of `batch_size` samples, out of the parameters' ``grad_sample``.

        A batch of no samples may come without one: many models cannot be run on it.
        """
        blocks = [_single(p) for p in parameters]
        if batch_size == 0 and all(block is None for block in blocks):
            return cls({p: p.detach().new_zeros((0, *p.shape)) for p in parameters})
        rows: dict[Tensor, Tensor] = {}
        for p, block in zip(parameters, blocks, strict=True):
            if block is None:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has no grad_sample: call backward "
                    "before step, and freeze (requires_grad_(False)) parameters that the loss "
                    "does not use"
                )
            if len(block) != batch_size:
                raise DPGuaranteeError(
                    f"losses has {batch_size} samples but a parameter of shape {tuple(p.shape)} "
                    f"has {len(block)} per-sample gradients: expected one loss per sample of the "
                    "batch, in its order, and a model that keeps the batch in dimension 0"
                )
            if hasattr(block, "_processed"):
                raise DPGuaranteeError(
                    "these gradients were stepped on already: call optimizer.zero_grad() after "
                    "every step, so that no sample is counted twice"
                )
            rows[p] = block.to(torch.promote_types(block.dtype, torch.float32))
        return cls(rows)


def _single(parameter: Tensor) -> Tensor | None:
    if not hasattr(parameter, "grad_sample"):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has no grad_sample: the model must go "
            "through IRWPrivacyEngine.make_private, or be an opacus GradSampleModule"
        )
    block = parameter.grad_sample
    if not isinstance(block, list):
        return block  # type: ignore[no-any-return]  # Opacus sets a tensor or None
    if len(block) > 1:
        raise DPGuaranteeError(
            f"grad_sample holds {len(block)} backward passes: gradient accumulation counts a "
            "sample twice. Call step() and zero_grad() after each backward, or let "
            "BatchMemoryManager split large batches"
        )
    return block[0] if block else None


class SpotCheck:
    """Compares a random combination of a batch's rows with autograd, unseen by Opacus' hooks."""

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks
        self.parameters = [p for p in hooks._module.parameters() if p.requires_grad]
        self.random = torch.Generator().manual_seed(0)
        self.batches = 0
        self.probe: Tensor | None = None
        self.truth: dict[Tensor, Tensor | None] = {}
        self.scale = torch.ones(0)  # (B,), what the training loop multiplied the losses with

    def look(self, losses: Tensor) -> None:
        """Take the gradient of a combination of losses (B,), if it is time; their graph stays."""
        self.probe = None
        if len(losses) < 2:
            return  # nobody to mix with
        batch = follow_batch(losses, walk(losses))
        self.batches += 1
        seldom = self.batches & (self.batches - 1) == 0
        if batch.mixed_by is None and not batch.computes_shared and not seldom:
            return
        self.probe = probe_of(losses, self.random)
        self.hooks.disable_hooks()
        try:
            gradients = torch.autograd.grad(
                losses, self.parameters, self.probe, retain_graph=True, allow_unused=True
            )
        finally:
            self.hooks.enable_hooks()
        self.truth = dict(zip(self.parameters, gradients, strict=True))

    def check(self, rows: GradSampleRows) -> None:
        """Raise a DPGuaranteeError unless the rows of the batch looked at last are autograd's."""
        if self.probe is None or not bool(self.scale.all()):
            return
        weights, self.probe = self.probe / self.scale, None
        covered = [p for p in self.truth if p in rows.rows]
        wrong = compare(covered, [self.truth[p] for p in covered], weights, rows)
        if wrong:
            raise DPGuaranteeError(
                f"the per-sample gradients differ from autograd's by {max(wrong.values()):.2g} of "
                "the gradient: the forward mixes the samples of a batch, or uses parameters "
                "outside their layers, so one person changes the gradients of others. Use "
                "layers that treat each sample alone"
            )


class PendingBatch:
    """The batch whose backward pass has run since the last step, with Opacus' ``grad_sample``.

    A loss counts once its backward has run: one that is only looked at does not.
    """

    def __init__(self, loss_reduction: str = "mean") -> None:
        self._backwarded: list[Tensor] = []
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
        if self._spot_check is not None:
            self._spot_check.look(losses)
        averaged = self._reduction == "mean"

        def arrive(gradient: Tensor) -> None:
            self._backwarded.append(losses.detach())
            if self._spot_check is not None:
                self._spot_check.scale = gradient * len(losses) if averaged else gradient

        losses.register_hook(arrive)
        reduced = losses.mean() if averaged else losses.sum()
        return batch.value + (reduced - reduced.detach())

    def clear(self) -> None:
        """Forget the losses whose gradients were thrown away."""
        self._backwarded.clear()

    def losses(self, given: Tensor | None = None) -> Tensor:
        """The losses of this backward pass, (B,), or those ``given``; they stay until `clear`."""
        if given is not None:
            return _checked(given)
        if not self._backwarded:
            raise DPGuaranteeError(
                "losses are missing: the weights need one loss per sample; give "
                "make_private(criterion=criterion) and call that criterion in training mode, or "
                "call optimizer.step(losses=losses) with losses of shape (B,)"
            )
        if len(self._backwarded) > 1:
            raise DPGuaranteeError(
                f"{len(self._backwarded)} backward passes since the last step: a sample could be "
                "counted twice. Call step() and zero_grad() after each backward, use "
                "BatchMemoryManager for large batches, and for a sum of criteria "
                "optimizer.step(losses=...) with the summed per-sample losses"
            )
        return self._backwarded[0]

    def rows(self, parameters: Sequence[Tensor], batch_size: int) -> ClippableGradients:
        """The per-sample gradients of the same backward pass, which are those of plain autograd."""
        rows = GradSampleRows.read(parameters, batch_size)
        if self._spot_check is not None:
            self._spot_check.check(rows)
        return rows


def follower_of(criterion: nn.Module) -> object | None:
    """Whoever is handed the losses of this criterion, if anybody still is."""
    attached = AttachedCriterion.found_on(criterion)
    listener = None if attached is None else attached.listener()
    return getattr(listener, "__self__", None)


def _checked(losses: object) -> Tensor:
    expected = "expected a floating-point tensor of shape (B,), one loss per sample"
    if not isinstance(losses, Tensor):
        raise DPGuaranteeError(f"losses={losses!r}: {expected}")
    if losses.ndim != 1 or not losses.is_floating_point():
        raise DPGuaranteeError(
            f"losses has shape {tuple(losses.shape)} and dtype {losses.dtype}: {expected}, as "
            'from F.cross_entropy(output, target, reduction="none")'
        )
    return losses.detach()
