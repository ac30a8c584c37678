"""The one autograd node that turns a batch of losses into the weighted gradient.

The loss that a training loop sees is the output of this node. Its inputs are the leaves of the
model's graph, so that whatever listens to autograd (gradient accumulation, hooks on parameters,
DistributedDataParallel) hears the weighted gradient as it would the ordinary one. Between the two
a nested backward pass, from the losses to the layers, gives the engine what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients

Weigh = Callable[[Tensor, PerSampleGradients], Tensor]
"""``weigh(upstream, rows)`` gives the factor on every loss's gradient, (B,)."""

ALREADY_PASSED = (
    "this loss was already backpropagated: its graph is gone; use "
    "loss.backward(retain_graph=True) the first time"
)


def weighted_loss(
    batch: PerSampleLosses,
    captured: LossGradients,
    scored: Callable[[Tensor], bool],
    weigh: Weigh,
) -> Tensor:
    """The criterion's value, whose gradient is ``sum_i c_i grad(loss_i)``.

    That of what is not the model's (inputs, other networks) is the ordinary one.

    Args:
        batch: the per-sample losses, detached.
        captured: their gradients.
        scored: which parameters' gradients make the score.
        weigh: chooses the factors c when the gradients are known, from them and from the gradient
            that arrives at the scalar, 0-dim.
    """
    plan = _Pass(batch, captured, scored, weigh)
    return deferred_loss(batch.value, plan, plan.leaves)


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
        batch: PerSampleLosses,
        captured: LossGradients,
        scored: Callable[[Tensor], bool],
        weigh: Weigh,
    ) -> None:
        self.batch = batch
        self.captured = captured
        self.scored = scored
        self.weigh = weigh
        self.leaves = (*captured.leaves, *captured.others)
        self.done = False

    def gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """The gradient of every leaf, for the gradient ``upstream`` of the scalar loss."""
        if self.done:
            raise RuntimeError(ALREADY_PASSED)
        captured = self.captured
        keep_graph = graph_is_kept()
        try:
            with without_autocast(upstream.device.type):
                total: dict[Tensor, Tensor] = {}
                others = captured.others and list(filter(captured.is_wanted, captured.others))
                weighted = not others or any(map(captured.is_wanted, captured.leaves))
                shared = keep_graph or walked_by_this_backward(captured)
                if weighted:
                    captured.start(seed_of(upstream, self.batch), shared)
                if others:
                    factors = upstream * self.batch.ordinary_factors()
                    total |= captured.plain_sum(others, factors, heard=weighted)
                if weighted:
                    weights = self.weigh(upstream, captured.rows(self.scored))
                    total |= captured.weighted_sum(weights, shared)
                return list(map(total.get, self.leaves))
        finally:
            if not keep_graph:
                self.done = True
                self.weigh = _forgotten  # it knows the losses, and they the graph
                captured.close()


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


def seed_of(upstream: Tensor, batch: PerSampleLosses) -> Tensor:
    """The factor that every loss carries through its backward pass: that of the ordinary mean.

    So hooks on activations hear gradients of the size that they expect, and half precision gets the
    scale that was chosen for it (a gradient scaler's, 1/accumulation steps), which leaves the
    weights alone; 0 would take the weights with it.
    """
    seed = upstream * (batch.scale / max(1, batch.losses.shape[0]))
    if seed.device.type == "cpu":  # looking at it waits for nothing there
        value = seed.item()
        return seed if value and isfinite(value) else torch.ones_like(seed)
    return torch.where((seed != 0) & seed.isfinite(), seed, torch.ones_like(seed))


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Products are taken in the precision that the tensors have, or better."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now was called with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def walked_by_this_backward(captured: LossGradients) -> bool:
    """Whether another term of the total loss goes through the same graph after us."""
    return any(map(torch._C._will_engine_execute_node, captured.graph.order))
