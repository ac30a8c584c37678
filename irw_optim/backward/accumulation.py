"""A logical batch: the weights of several backward passes decided together.

Gradient accumulation adds up physical batches because the whole one does not fit. S, the scores
and the weights of the whole need G = [G_1; ...; G_k], and every product with G is a sum or a row
of products with the G_j. So each backward pass only starts its batch: what it keeps is the layers'
inputs and output gradients (for parameters that only autodiff covers, the graph). The k-th one
decides, and gives the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from irw_optim.backward.deferred import deferred_loss, seed_of, without_autocast
from irw_optim.backward.passes import Pass
from irw_optim.backward.weighted_loss import BatchPass, Weigher
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.concatenated import ConcatenatedGradients
from irw_optim.gradients.ghost import check_inputs
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.materialized import widened
from irw_optim.torch_internals import is_wanted


class LogicalBatch:
    """Backward passes that wait for each other.

    Args:
        size: number of backward passes that make the batch, k.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.members: list[_Member] = []

    def loss(
        self,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
    ) -> Tensor:
        """The criterion's value; the backward pass of the k-th gives the gradient of all k.

        Args:
            batch: per-sample losses of one physical batch, detached.
            captured: their gradients.
            scored: which parameters make the scores.
            weigher: gives the factor on every loss's gradient, from all passes and their rows.
        """
        # Not the leaves: hooks on parameters would be called in passes that give no gradient.
        anchor = torch.zeros_like(batch.value).requires_grad_()
        member = _Member(self, batch, captured, scored, weigher, get_gradient_edge(anchor))
        return deferred_loss(batch.value, member, [anchor, *captured.others])

    def finish(self) -> None:
        """Decide with the members there are, and add the gradient to ``p.grad``."""
        if self.members:
            with without_autocast(self.members[0].batch.losses.device.type):
                total = self.gradient()
            # As a backward pass does it, so that hooks on the leaves are called.
            torch.autograd.backward(list(total), list(total.values()))

    def gradient(self) -> dict[Tensor, Tensor]:
        """The gradient of the whole batch, for every leaf; the members are let go."""
        members = self.members
        try:
            rows = ConcatenatedGradients(
                [member.captured.rows(member.scored) for member in members],
                like=widened(members[0].batch.losses),
            )
            passes = [Pass(member.batch, member.factor) for member in members]
            coefficients = members[-1].weigher.coefficients(passes, rows)
            total: dict[Tensor, Tensor] = {}
            for member, some in zip(members, coefficients.split(rows.sizes), strict=True):
                for leaf, gradient in member.weighted_sum(some).items():
                    total[leaf] = total[leaf] + gradient if leaf in total else gradient
            return total
        finally:
            self.clear()

    def clear(self) -> None:
        """Let go of what was kept."""
        for member in self.members:
            member.captured.close()
        self.members = []


class _Member(BatchPass):
    """One physical batch, from its forward to the end of the logical one."""

    ALREADY_PASSED = (
        "a second backward pass through one loss cannot be a part of a logical batch: "
        "expected one backward() for each loss, or IRWOptimizer without accumulation_steps"
    )

    def __init__(
        self,
        logical: LogicalBatch,
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigher: Weigher,
        anchor: GradientEdge,
    ) -> None:
        super().__init__(batch, captured, scored, weigher)
        self.anchor = anchor
        self.logical = logical
        self.factor: Tensor | float = 0.0

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Start this batch; the k-th pass adds the gradient of the whole to ``p.grad``."""
        captured = self.captured
        others = [leaf for leaf in captured.others if captured.is_wanted(leaf)]
        weighted = is_wanted(self.anchor.node)
        if weighted:
            self._start(upstream, keep_graph)
        plain = {}
        if others:
            factors = upstream * self.batch.ordinary_factors()
            plain = captured.plain_sum(others, factors, hooks_ran=weighted)
        if weighted and len(self.logical.members) == self.logical.size:
            self.logical.finish()
        return [None, *[plain.get(leaf) for leaf in captured.others]]

    def _start(self, upstream: Tensor, keep_graph: bool) -> None:
        captured = self.captured
        self.passed = True
        walked = captured.is_walked_on()
        captured.start(seed_of(upstream, self.batch), keep_graph or walked)
        if walked and not keep_graph and captured.finished_by_autograd:
            captured.close()
            raise RuntimeError(
                "the total loss has another term that goes through the model's graph, and "
                "some parameters need that graph until the logical batch is complete: use "
                "backward(retain_graph=True), or IRWOptimizer without accumulation_steps"
            )
        self.factor = upstream
        self.logical.members.append(self)

    def leave(self) -> None:
        """The others are still to come: the logical batch lets go of all."""

    def weighted_sum(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """Sum of w_i times the gradient of loss i, by leaf."""
        captured = self.captured
        if captured.ghost is not None:
            check_inputs(captured.ghost.calls)
        return captured.weighted_sum(weights, keep_graph=False)
