"""What a backward pass leaves for the private optimizer: the losses, and the gradients' rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from irw_optim.criterion import PerSampleLosses, validate_criterion
from irw_optim.criterion.attached import AttachedCriterion
from irw_optim.errors import DPGuaranteeError

from .rows import ClippableGradients, GradSampleRows
from .spot_check import SpotCheck

__all__ = ["PendingBatch", "check_criterion", "follower_of"]


def check_criterion(criterion: nn.Module, loss_reduction: str) -> None:
    """Raise unless the criterion's per-sample losses are known and reduce as the gradients do.

    Opacus undoes the mean by the batch size; with another reduction the clipping of one sample
    would depend on how many others were drawn, which is private.

    Raises:
        TypeError: not a module with per-sample losses.
        ValueError: another reduction than `loss_reduction`.

    Example:
        >>> check_criterion(nn.CrossEntropyLoss(reduction="sum"), "mean")
        Traceback (most recent call last):
        ...
        ValueError: criterion CrossEntropyLoss has reduction='sum' but loss_reduction='mean':
        expected the same; construct the criterion with reduction='mean'
    """
    validate_criterion(criterion)
    if criterion.reduction != loss_reduction:
        raise ValueError(
            f"criterion {type(criterion).__name__} has reduction={criterion.reduction!r} but "
            f"loss_reduction={loss_reduction!r}: expected the same; construct the criterion with "
            f"reduction={loss_reduction!r}"
        )


class PendingBatch:
    """The batch whose backward pass has run since the last step, with Opacus' ``grad_sample``.

    A loss counts once its backward has run: one that is only looked at, or thrown away, does not.

    Example:
        >>> import torch
        >>> model, pending, criterion = nn.Linear(1, 1), PendingBatch(), nn.MSELoss()
        >>> pending.follow(criterion, model)
        >>> output = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> criterion(output, torch.zeros(2)).backward()
        >>> pending.losses()
        tensor([1., 9.])
        >>> pending.unfollow()
    """

    def __init__(self, loss_reduction: str = "mean") -> None:
        self._backwarded: list[Tensor] = []
        self._reduction = loss_reduction
        self._attached: AttachedCriterion | None = None
        self._spot_check: SpotCheck | None = None

    def follow(self, criterion: nn.Module, model: nn.Module, hooks: Any = None) -> None:
        """Let `criterion`, called while `model` trains, leave its losses here; in place.

        What it returns keeps its value. Its gradient is that of the mean (or sum) of the
        per-sample losses, which differs from torch's where torch divides by something that the
        whole batch decides, as with class weights or ignored targets.

        Args:
            criterion: the loss that the training loop calls.
            model: asked whether it trains.
            hooks: Opacus' GradSampleHooks; if given, rows are compared with plain autograd.
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
        """The losses of this backward pass, (B,), detached; they stay until `clear`.

        Args:
            given: losses that the training loop hands to ``step(losses=...)`` itself.

        Raises:
            DPGuaranteeError: no losses, those of several backward passes, or not one number a
                sample.
        """
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
        """The per-sample gradients of the same backward pass; errors as `GradSampleRows.read`.

        Raises:
            DPGuaranteeError: rows that are not those of plain autograd.
        """
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
