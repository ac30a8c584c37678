"""A scalar loss whose gradient is made when the backward pass arrives at it.

Its inputs are the leaves of the model's graph, so that whatever listens to autograd (gradient
accumulation, hooks on parameters, DistributedDataParallel) hears the weighted gradient as it would
the ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.torch_internals import graph_is_kept


class Deferred:
    """What a loss does when its backward pass arrives: once, unless the graph is kept.

    Attributes:
        captured: the gradients of single losses, held until the pass is over; None for none.
        leaves: of the model's graph, if it is these that get the gradients.
        passed: whether it has happened.
    """

    ALREADY_PASSED = (
        "this loss was already backpropagated: its graph is gone; use "
        "loss.backward(retain_graph=True) the first time"
    )

    captured: LossGradients | None = None
    leaves: tuple[Tensor, ...] = ()
    passed = False

    def gradients(self, upstream: Tensor) -> list[Tensor | None]:
        """The gradient of every leaf, for the gradient ``upstream`` of the scalar loss."""
        if self.passed:
            raise RuntimeError(self.ALREADY_PASSED)
        keep_graph = graph_is_kept()
        try:
            with without_autocast(upstream.device.type):
                return self.arrive(upstream, keep_graph)
        finally:
            if not keep_graph:
                self.passed = True
                self.leave()

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """The gradient of every leaf; ``keep_graph`` where another pass may follow."""
        raise NotImplementedError

    def leave(self) -> None:
        """The pass is over."""
        if self.captured is not None:
            self.captured.close()


def deferred_loss(value: Tensor, deferred: Deferred, leaves: Iterable[Tensor]) -> Tensor:
    """A scalar with the given value, whose gradients of the leaves are deferred."""
    return _DeferredLoss.apply(value, deferred, *leaves)  # type: ignore[no-untyped-call, no-any-return]


class _DeferredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, deferred: Deferred, *leaves: Tensor) -> Tensor:
        ctx.deferred = deferred
        return value.detach()  # another tensor: its graph is that of the loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) was called on a weighted loss: its gradient cannot be "
                "differentiated again, since the weights are constants of the step; leave "
                "create_graph out (optimizers that need curvature, such as AdaHessian and SophiaH, "
                "cannot be inside IRWOptimizer)"
            )
        return None, None, *ctx.deferred.gradients(upstream)


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
    seed = seed.nan_to_num(1.0, posinf=1.0, neginf=1.0)
    return seed.masked_fill_(seed == 0, 1.0)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Products are taken in the precision that the tensors have, or better."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _AS_IT_IS


_AS_IT_IS = nullcontext()
