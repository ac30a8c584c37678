"""The one autograd node that turns a batch of losses into the weighted gradient.

The loss that a training loop sees is the output of this node. Its inputs are the leaves of the
model's graph, so that whatever listens to autograd (gradient accumulation, hooks on parameters,
DistributedDataParallel) hears the weighted gradient as it would the ordinary one. Between the two
a nested backward pass, from the losses to the layers, gives the engine what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from irw_optim.gradients.engine import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients

Weigh = Callable[[Tensor, PerSampleGradients], Tensor]
"""``weigh(upstream, rows)`` gives the factor on every loss's gradient, (B,)."""

ALREADY_PASSED = (
    "this loss was already backpropagated: its graph is gone; use "
    "loss.backward(retain_graph=True) the first time"
)


def weighted_loss(
    value: Tensor, batch: LossGradients, scored: Callable[[Tensor], bool], weigh: Weigh
) -> Tensor:
    """A scalar with the given value whose gradient is ``sum_i c_i grad(loss_i)``.

    Args:
        value: what the training loop sees, 0-dim, detached.
        batch: the per-sample gradients.
        scored: which parameters' gradients make the score.
        weigh: chooses the factors c when the gradients are known, from them and from the gradient
            that arrives at the scalar, 0-dim.
    """
    return deferred_loss(value, _Pass(batch, scored, weigh), batch.leaves)


class Plan(Protocol):
    """What a loss does when its backward pass arrives."""

    def gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """The gradient of every leaf, for the gradient ``upstream`` of the scalar loss."""


def deferred_loss(value: Tensor, plan: Plan, leaves: Iterable[Tensor]) -> Tensor:
    """A scalar with the given value whose gradient is what the plan says."""
    return _DeferredLoss.apply(value, plan, *leaves)  # type: ignore[no-untyped-call, no-any-return]


class _Pass:
    """What the backward pass of one loss will need."""

    def __init__(
        self,
        batch: LossGradients,
        scored: Callable[[Tensor], bool],
        weigh: Weigh,
    ) -> None:
        self.batch = batch
        self.scored = scored
        self.weigh = weigh
        self.done = False

    def gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """The gradient of every leaf, for the gradient ``upstream`` of the scalar loss."""
        if self.done:
            raise RuntimeError(ALREADY_PASSED)
        batch = self.batch
        keep_graph = graph_is_kept()
        try:
            with without_autocast(upstream.device.type):
                shared = keep_graph or walked_by_this_backward(batch)
                batch.start(seed_of(upstream), shared)
                return batch.weighted_sum(self.weigh(upstream, batch.rows(self.scored)), shared)
        finally:
            if not keep_graph:
                self.done = True
                self.weigh = _forgotten  # it knows the losses, and they the graph
                batch.close()


class _DeferredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, plan: Plan, *leaves: Tensor) -> Tensor:
        ctx.plan = plan
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) was called on a weighted loss: its gradient cannot be "
                "differentiated again, since the weights are constants of the step; leave "
                "create_graph out (optimizers that need curvature, such as AdaHessian and SophiaH, "
                "cannot be inside IRWOptimizer)"
            )
        return None, None, *ctx.plan.gradients(upstream)


def _forgotten(upstream: Tensor, rows: PerSampleGradients) -> Tensor:
    raise AssertionError("weights are asked for once a backward pass, and this one is over")


def seed_of(upstream: Tensor) -> Tensor:
    """The factor that the losses carry through their backward pass.

    A factor on the loss (a gradient scaler's, 1/accumulation steps) rides along, since half
    precision may need it, and leaves the weights alone; 0 would take the weights with it.
    """
    if upstream.device.type == "cpu":  # looking at it waits for nothing there
        return upstream if upstream.item() else torch.ones_like(upstream)
    return torch.where(upstream == 0, torch.ones_like(upstream), upstream)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Products are taken in the precision that the tensors have, or better."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now was called with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def walked_by_this_backward(batch: LossGradients) -> bool:
    """Whether another term of the total loss goes through the same graph after us."""
    return any(torch._C._will_engine_execute_node(node) for node in batch.graph.nodes)
