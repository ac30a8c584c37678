"""A logical batch: the weights of several backward passes decided together.

The whole batch has G = [G_1; ...; G_k], and every product with G is a sum or a row of products with
the G_j. So each backward pass only starts its batch: it keeps the layers' inputs and output
gradients (for parameters that only autodiff covers, the graph). The k-th one decides, and gives the
gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from irw_optim.backward.passes import Pass
from irw_optim.backward.weighted_loss import (
    BatchPass,
    Weigher,
    deferred_loss,
    seed_of,
    without_autocast,
)
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.ghost import check_inputs
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import Direction, PerSampleGradients, blocked_gram, widened
from irw_optim.torch_internals import is_wanted, will_run


class LogicalBatch:
    """``size`` backward passes, which wait for each other."""

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
        """The criterion's value for one physical batch; see `weighted_loss`."""
        # Not the leaves: hooks on parameters would be called in passes that give no gradient.
        anchor = torch.zeros_like(batch.value).requires_grad_()
        member = _Member(batch, captured, scored, weigher, self, get_gradient_edge(anchor))
        return deferred_loss(batch.value, member, [anchor, *captured.others])

    def finish(self) -> None:
        """Decide with the members there are, and add the gradient to ``p.grad``."""
        members = self.members
        if not members:
            return
        losses, total = members[0].batch.losses, dict[Tensor, Tensor]()
        try:
            with without_autocast(losses.device.type):
                parts = [member.captured.rows(member.scored) for member in members]
                rows = ConcatenatedGradients(parts, like=widened(losses))
                passes = [Pass(member.batch, member.factor) for member in members]
                factors = members[-1].weigher.coefficients(passes, rows)
                for member, some in zip(members, factors.split(rows.sizes), strict=True):
                    captured = member.captured
                    if captured.ghost is not None:
                        check_inputs(captured.ghost.calls)
                    for leaf, gradient in captured.weighted_sum(some, keep_graph=False).items():
                        total[leaf] = total[leaf] + gradient if leaf in total else gradient
        finally:
            self.clear()
        # Frozen since their pass, they keep its gradient as in any accumulation.
        for leaf in [leaf for leaf in total if not leaf.requires_grad]:
            gradient = total.pop(leaf)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        # As a backward pass does it, so that hooks on the leaves are called.
        torch.autograd.backward(list(total), list(total.values()))

    def clear(self) -> None:
        """Let go of what was kept."""
        for member in self.members:
            member.captured.close()
        self.members = []


@dataclass(eq=False)
class _Member(BatchPass):
    """One physical batch, from its forward to the end of the logical one."""

    ALREADY_PASSED = (
        "a second backward pass through one loss cannot be a part of a logical batch: "
        "expected one backward() for each loss, or IRWOptimizer without accumulation_steps"
    )

    logical: LogicalBatch
    anchor: GradientEdge
    factor: Tensor | float = 0.0

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Start this batch; the k-th pass adds the gradient of the whole to ``p.grad``."""
        captured, logical = self.captured, self.logical
        others = list(filter(captured.is_wanted, captured.others))
        weighted = is_wanted(self.anchor.node)
        if weighted:
            self.passed = True
            walked = any(map(will_run, captured.graph.order))
            captured.start(seed_of(upstream, self.batch), keep_graph or walked)
            if walked and not keep_graph and captured.finished_by_autograd:
                captured.close()
                raise RuntimeError(
                    "the total loss has another term that goes through the model's graph, and "
                    "some parameters need that graph until the logical batch is complete: use "
                    "backward(retain_graph=True), or IRWOptimizer without accumulation_steps"
                )
            self.factor = upstream
            logical.members.append(self)
        plain = {}
        if others:
            factors = upstream * self.batch.ordinary_factors()
            plain = captured.plain_sum(others, factors, hooks_ran=weighted)
        if weighted and len(logical.members) == logical.size:
            logical.finish()
        return [None, *map(plain.get, captured.others)]

    def leave(self) -> None:
        """The others are still to come: the logical batch lets go of all."""


class ConcatenatedGradients:
    """The rows of several batches in their order: G = [G_1; G_2; ...].

    A parameter that a batch did not use has rows of zeros there. Weights have the device and the
    dtype of ``like``.

    >>> from irw_optim.gradients import MaterializedGradients
    >>> weight = torch.zeros(1)
    >>> rows = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    >>> G = ConcatenatedGradients([MaterializedGradients({weight: r}) for r in rows], like=weight)
    >>> G.combine(torch.ones(3))[weight], G.dot({weight: torch.ones(1)})
    (tensor([6.]), tensor([1., 2., 3.]))
    >>> G.gram()[2]
    tensor([3., 6., 9.])
    """

    def __init__(self, parts: Iterable[PerSampleGradients], like: Tensor) -> None:
        self.parts = list(parts)
        self.sizes = [part.batch_size for part in self.parts]
        self.batch_size = sum(self.sizes)
        self.like = like

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """G^T w."""
        total: dict[Tensor, Tensor] = {}
        for part, some in zip(self.parts, weights.split(self.sizes), strict=True):
            for p, gradient in part.combine(some).items():
                total[p] = total[p] + gradient if p in total else gradient
        return total

    def dot(self, direction: Direction) -> Tensor:
        """G v."""
        return torch.cat([part.dot(direction) for part in self.parts])

    def gram(self) -> Tensor:
        """Across batches only the rows themselves meet: they are made a block at a time."""
        zeros = self.combine(self.like.new_zeros(self.batch_size))

        def rows(samples: slice) -> dict[Tensor, Tensor]:
            each = [{**zeros, **self._row(i)} for i in range(self.batch_size)[samples]]
            return {p: torch.stack([row[p] for row in each]) for p in zeros}

        numbers = sum(t.numel() for t in zeros.values())
        return blocked_gram(self.batch_size, numbers, rows)

    def _row(self, sample: int) -> dict[Tensor, Tensor]:
        part = 0
        while sample >= self.sizes[part]:
            sample -= self.sizes[part]
            part += 1
        one = self.like.new_zeros(self.sizes[part])
        one[sample] = 1
        return self.parts[part].combine(one)
