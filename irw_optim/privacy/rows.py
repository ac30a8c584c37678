"""Per-sample gradients that can be clipped: the three products, and their norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.materialized import MaterializedGradients, as_matrix
from irw_optim.gradients.protocol import PerSampleGradients

__all__ = ["ClippableGradients", "GradSampleRows"]


class ClippableGradients(PerSampleGradients, Protocol):
    """What the private optimizer asks of an engine beyond the three products."""

    def norms(self) -> Tensor:
        """|g_i| over all parameters, (B,)."""

    def without(self, dropped: Tensor) -> ClippableGradients:
        """The same gradients with zero rows where `dropped` (B,) bool: 0 times NaN is NaN."""


class GradSampleRows(MaterializedGradients):
    """``p.grad_sample`` as Opacus' hooks leave it, in float32 or better.

    Example:
        >>> rows = GradSampleRows({torch.zeros(2): torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
        >>> rows.norms()
        tensor([5., 1.])
    """

    def norms(self) -> Tensor:
        """|g_i| over all parameters, (B,)."""
        squares = [as_matrix(block).square().sum(1) for block in self.rows.values()]
        return torch.stack([s.to(squares[0].device) for s in squares]).sum(0).sqrt()

    def without(self, dropped: Tensor) -> GradSampleRows:
        """The same gradients with zero rows where `dropped` (B,) bool."""
        return GradSampleRows(
            {
                p: block.masked_fill(_as_column(dropped, block), 0.0)
                for p, block in self.rows.items()
            }
        )

    @classmethod
    def read(cls, parameters: Sequence[Tensor], batch_size: int) -> GradSampleRows:
        """One backward pass of `batch_size` samples, out of the parameters' ``grad_sample``.

        A batch of no samples may come without a backward pass: many models cannot be run on it.

        Raises:
            ValueError: the model has no hooks, or a parameter took no part in the backward pass.
            DPGuaranteeError: several backward passes, one that was stepped on already, or one of
                another batch size than that of the losses.
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


def _as_column(vector: Tensor, block: Tensor) -> Tensor:
    return vector.to(block.device).view(-1, *(1,) * (block.ndim - 1))
