"""A logical batch: the weights of several backward passes decided together.

Each backward pass only starts its batch: it keeps the layers' inputs and output gradients, or the
graph where autodiff needs it. The k-th one decides, and gives the gradient of the whole.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.ghost import check_inputs
from irw_optim.gradients.layers import summed
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import Direction, PerSampleGradients, blocked_gram, widened
from irw_optim.torch_internals import is_wanted, will_run

from .weighted_loss import BatchPass, Pass, Weigher, deferred_loss, seed_of, without_autocast


class LogicalBatch:
    """``size`` backward passes that wait for each other."""

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
        # Not the leaves: hooks on parameters would be called in passes that give no gradient.
        anchor = torch.zeros_like(batch.value).requires_grad_()
        member = _Member(batch, captured, scored, weigher, self, get_gradient_edge(anchor))
        return deferred_loss(batch.value, member, [anchor, *captured.others])

    def finish(self) -> None:
        """Decide with the members that there are, and add to ``p.grad``."""
        members = self.members
        losses = members[0].batch.losses
        try:
            with without_autocast(losses.device.type):
                parts = [member.captured.rows(member.scored) for member in members]
                rows = ConcatenatedGradients(parts, like=widened(losses))
                passes = [Pass(member.batch, member.factor) for member in members]
                factors = members[-1].weigher.coefficients(passes, rows).split(rows.sizes)
                total = summed(map(_Member.weighted_sum, members, factors))
        finally:
            self.clear()
        # Frozen since their pass, they keep its gradient.
        for leaf in [leaf for leaf in total if not leaf.requires_grad]:
            gradient = total.pop(leaf)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        # As a backward pass does it, so that hooks on the leaves are called.
        torch.autograd.backward(list(total), list(total.values()))

    def clear(self) -> None:
        for member in self.members:
            member.captured.close()
        self.members = []


@dataclass(eq=False)
class _Member(BatchPass):
    ALREADY_PASSED = (
        "a second backward pass through one loss cannot be a part of a logical batch: "
        "expected one backward() for each loss, or IRWOptimizer without accumulation_steps"
    )

    logical: LogicalBatch
    anchor: GradientEdge
    factor: Tensor | float = 0.0

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Start this batch, or finish the whole with it."""
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

    def weighted_sum(self, factors: Tensor) -> dict[Tensor, Tensor]:
        if self.captured.ghost is not None:
            check_inputs(self.captured.ghost.calls)
        return self.captured.weighted_sum(factors, keep_graph=False)

    def leave(self) -> None:
        """The logical batch lets go of all."""


class ConcatenatedGradients:
    """The rows of several batches: G = [G_1; G_2; ...], with zeros for what a batch did not use.

    Weights have the device and the dtype of ``like``.
    """

    def __init__(self, parts: Iterable[PerSampleGradients], like: Tensor) -> None:
        self.parts = list(parts)
        self.sizes = [part.batch_size for part in self.parts]
        self.batch_size = sum(self.sizes)
        self.like = like

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        each = zip(self.parts, weights.split(self.sizes), strict=True)
        return summed(part.combine(some) for part, some in each)

    def dot(self, direction: Direction) -> Tensor:
        return torch.cat([part.dot(direction) for part in self.parts])

    def gram(self) -> Tensor:
        """From rows, some at a time."""
        zeros = self.combine(self.like.new_zeros(self.batch_size))
        sizes = zip(self.parts, self.sizes, strict=True)
        each = [(part, one) for part, size in sizes for one in torch.eye(size).to(self.like)]

        def rows(samples: slice) -> dict[Tensor, Tensor]:
            found = [{**zeros, **part.combine(one)} for part, one in each[samples]]
            return {p: torch.stack([row[p] for row in found]) for p in zeros}

        numbers = sum(t.numel() for t in zeros.values())
        return blocked_gram(self.batch_size, numbers, rows)
