"""Are the rows that get clipped really the gradients of single losses?

The guarantee rests on it, and no look at the modules shows it: a forward may mix the samples of the
batch (``h - h.mean(0)``), and then what is clipped as one sample's gradient carries others. The
graph of the losses shows whether any operation can; plain autograd, for a random vector r, whether
G^T r is what the rows say: at every batch where samples may meet, else at batches 1, 2, 4, 8, ...
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.graph import walk
from irw_optim.gradients.materialized import as_matrix
from irw_optim.gradients.mixing import follow_batch
from irw_optim.gradients.verification import probe_of

from .rows import GradSampleRows

__all__ = ["SpotCheck"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative; far above rounding, far below what any mixing of samples does."""


class SpotCheck:
    """Compares a random combination of a batch's rows with autograd.

    Args:
        hooks: Opacus' GradSampleHooks, kept from seeing the extra backward passes.
    """

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks
        self.parameters = [p for p in hooks._module.parameters() if p.requires_grad]
        self.random = torch.Generator().manual_seed(0)
        self.batches = 0
        self.probe: Tensor | None = None
        self.truth: list[Tensor] = []
        self.scale = torch.ones(0)  # (B,), what the training loop multiplied the losses with

    def look(self, losses: Tensor) -> None:
        """Take the gradient of a combination of losses, if it is time; their graph stays.

        Args:
            losses: (B,), with their graph; fewer than two have nobody to mix with.
        """
        self.probe = None
        if len(losses) < 2:
            return
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
        pairs = zip(self.parameters, gradients, strict=True)
        self.truth = [torch.zeros_like(p) if g is None else g for p, g in pairs]

    def check(self, rows: GradSampleRows) -> None:
        """Compare the rows of the batch that was looked at last.

        Raises:
            DPGuaranteeError: they differ from autograd's.
        """
        if self.probe is None or not bool(self.scale.all()):
            return
        weights = self.probe / self.scale
        self.probe = None
        pairs = [
            ((weights.to(block.dtype) @ as_matrix(block)).view_as(p), g)
            for p, g in zip(self.parameters, self.truth, strict=True)
            if (block := rows.rows.get(p)) is not None
        ]
        error = _norm([claim - g for claim, g in pairs])
        size = _norm([g for _, g in pairs])
        tolerance = max(_TOLERANCE.get(g.dtype, 1.5e-1) for _, g in pairs)
        if error > tolerance * size:  # false for what is not finite
            raise DPGuaranteeError(
                f"the per-sample gradients differ from autograd's by {error / size:.2g} of the "
                "gradient: the forward mixes the samples of a batch, or uses parameters "
                "outside their layers, so one person changes the gradients of others. Use "
                "layers that treat each sample alone"
            )


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
