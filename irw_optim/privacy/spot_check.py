"""Are the rows that get clipped really the gradients of single losses?

The guarantee rests on it, and no look at the modules shows it: a forward may mix the samples of the
batch (``h - h.mean(0)``), and then what is clipped as one sample's gradient carries others. Plain
autograd knows better, so two rows of the first batch are compared with it, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import DPGuaranteeError
from .rows import GradSampleRows

__all__ = ["SpotCheck"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative; far above rounding, far below what any mixing of samples does."""


class SpotCheck:
    """Compares the first and the last row of a batch with autograd.

    Args:
        hooks: Opacus' GradSampleHooks, kept from seeing the extra backward passes.
    """

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks
        self.parameters = [p for p in hooks._module.parameters() if p.requires_grad]
        self.truth: dict[int, list[Tensor | None]] = {}
        self.scale = torch.ones(0)  # (B,), what the training loop multiplied the losses with

    def look(self, losses: Tensor) -> None:
        """Take the gradients of two losses by themselves; the graph of the losses stays.

        Args:
            losses: (B,), with their graph; fewer than two have nobody to mix with.
        """
        self.truth.clear()
        if len(losses) < 2:
            return
        self.hooks.disable_hooks()
        try:
            for i in (0, len(losses) - 1):
                gradients = torch.autograd.grad(
                    losses[i], self.parameters, retain_graph=True, allow_unused=True
                )
                self.truth[i] = list(gradients)
        finally:
            self.hooks.enable_hooks()

    def passes(self, rows: GradSampleRows) -> bool:
        """Whether rows were compared, and agreed.

        Raises:
            DPGuaranteeError: they differ.
        """
        for i, gradients in self.truth.items():
            pairs = [
                (rows.rows[p][i], torch.zeros_like(p) if g is None else g * self.scale[i])
                for p, g in zip(self.parameters, gradients, strict=True)
                if p in rows.rows
            ]
            error = _norm([row - g for row, g in pairs])
            size = _norm([g for _, g in pairs])
            tolerance = max(_TOLERANCE.get(g.dtype, 3e-2) for _, g in pairs)
            if error > tolerance * size:  # false for what is not finite
                raise DPGuaranteeError(
                    f"the per-sample gradients differ from autograd's by {error / size:.2g} of the "
                    "gradient: the forward mixes the samples of a batch, or uses parameters "
                    "outside their layers, so one person changes the gradients of others. Use "
                    "layers that treat each sample alone"
                )
        return bool(self.truth)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())
