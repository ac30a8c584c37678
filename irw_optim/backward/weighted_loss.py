"""From a batch of losses to a scalar whose gradient is made when the backward pass arrives at it.

A scheme decides the weights of a batch. A `Weigher` knows what the batch is (that of one backward
pass, of several, or of all processes) and how long the step: what it gives is the factor on the
gradient of every loss at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from irw_optim.backward.passes import Pass, as_one
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.torch_internals import graph_is_kept, uncompiled, will_run
from irw_optim.weighting import NoRows, Scheme, StepRecord

Note = Callable[[StepRecord], None]


class Weigher(Protocol):
    """Decides for one or more passes together."""

    scheme: Scheme
    note: Note

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of the passes, (B,)."""

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """The criterion's value, carrying the weighted gradient, by the losses alone."""


class OneProcess:
    """Weighs the samples at hand; ``note`` is told what was decided, when a backward pass runs."""

    def __init__(self, scheme: Scheme, note: Note) -> None:
        self.scheme = scheme
        self.note = note

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """Weights times length: the ordinary gradient is sum_j factor_j mean_j."""
        batch, length = passes[0]
        if len(passes) > 1:
            length = sum(factor * some.scale for some, factor in passes)
            batch = as_one(passes)
        elif not (isinstance(batch.scale, float) and batch.scale == 1.0):
            length = length * batch.scale
        record = self.scheme.decide(batch, rows)
        self.note(record)
        return record.weights * length

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """Where the weights are known before backward, ordinary autograd does the rest."""
        record = self.scheme.decide(batch, NoRows(len(batch.losses)))
        loss = with_gradient(batch, record.weights * batch.scale)
        loss.register_hook(lambda _: self.note(record))
        return loss


class Deferred:
    """What a loss does when its backward pass arrives: once, unless the graph is kept."""

    ALREADY_PASSED = (
        "this loss was already backpropagated: its graph is gone; use "
        "loss.backward(retain_graph=True) the first time"
    )
    ERROR: ClassVar[type[Exception]] = RuntimeError

    captured: LossGradients | None = None  # held until the pass is over
    passed = False  # whether it has happened

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """The gradient of every leaf, for that of the scalar loss; another pass may follow."""
        raise NotImplementedError

    def leave(self) -> None:
        """The pass is over."""
        if self.captured is not None:
            self.captured.close()


@dataclass(eq=False)
class BatchPass(Deferred):
    """The backward pass of one batch that is weighed."""

    batch: PerSampleLosses  # detached
    captured: LossGradients = field()
    scored: Callable[[Tensor], bool]  # which leaves' gradients make the score
    weigher: Weigher  # chooses the factors when the gradients are known


@dataclass(eq=False)
class WeightedPass(BatchPass):
    """One that is weighed by itself."""

    leaves: Sequence[Tensor]

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """Weigh, and sum up."""
        captured, batch = self.captured, self.batch
        total: dict[Tensor, Tensor] = {}
        others = captured.others and list(filter(captured.is_wanted, captured.others))
        weighted = not others or any(map(captured.is_wanted, captured.leaves))
        keep_graph = keep_graph or any(map(will_run, captured.graph.order))
        if weighted:
            alike = others if others and batch.counts is None else ()
            captured.start(seed_of(upstream, batch), keep_graph, alike)
        if others:
            factors = upstream * batch.ordinary_factors()
            total |= captured.plain_sum(others, factors, hooks_ran=weighted)
        if weighted:
            rows = captured.rows(self.scored)
            weights = self.weigher.coefficients([Pass(batch, upstream)], rows)
            del rows  # which may hold g_S
            total |= captured.weighted_sum(weights, keep_graph)
        return list(map(total.get, self.leaves))


def weighted_loss(
    batch: PerSampleLosses,
    captured: LossGradients,
    scored: Callable[[Tensor], bool],
    weigher: Weigher,
) -> Tensor:
    """The criterion's value, whose gradient is ``sum_i c_i grad(loss_i)``.

    That of what is not the model's (inputs, other networks) is the ordinary one.
    """
    leaves = (*captured.leaves, *captured.others)
    weighted = WeightedPass(batch, captured, scored, weigher, leaves)
    return _DeferredLoss.apply(batch.value, weighted, *leaves)  # type: ignore[no-untyped-call, no-any-return]


def deferred_loss(value: Tensor, deferred: Deferred, leaves: Iterable[Tensor]) -> Tensor:
    """A scalar with the given value, whose gradients of the leaves are deferred.

    So whatever listens to autograd (gradient accumulation, hooks on parameters,
    DistributedDataParallel) hears the weighted gradient as it would the ordinary one.
    """
    return _DeferredLoss.apply(value, deferred, *leaves)  # type: ignore[no-untyped-call, no-any-return]


class _DeferredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, deferred: Deferred, *leaves: Tensor) -> Tensor:
        ctx.deferred = deferred
        return value.detach()  # another tensor: its graph is that of the loss

    @staticmethod
    @uncompiled  # where a whole training step is compiled
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        deferred: Deferred = ctx.deferred
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) was called on a weighted loss: its gradient cannot be "
                "differentiated again, since the weights are constants of the step; leave "
                "create_graph out (optimizers that need curvature, such as AdaHessian and SophiaH, "
                "cannot be inside IRWOptimizer)"
            )
        if deferred.passed:
            raise deferred.ERROR(deferred.ALREADY_PASSED)
        keep_graph = graph_is_kept()
        try:
            with without_autocast(upstream.device.type):
                return None, None, *deferred.arrive(upstream, keep_graph)
        finally:
            if not keep_graph:
                deferred.passed = True
                deferred.leave()


def seed_of(upstream: Tensor, batch: PerSampleLosses) -> Tensor:
    """The factor that every loss carries through its backward pass: that of the ordinary mean.

    So hooks on activations hear gradients of the size that they expect, and half precision gets a
    gradient scaler's scale. 0 would take the weights with it.
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


def ordinary_loss(batch: PerSampleLosses) -> Tensor:
    """The criterion's value with its own gradient: nobody's samples are weighed."""
    return with_gradient(batch, batch.ordinary_factors())


def with_gradient(batch: PerSampleLosses, factors: Tensor) -> Tensor:
    """The criterion's value, with these factors on the gradient of every loss, (B,)."""
    carrier = (factors.to(batch.losses.dtype) * batch.losses).sum()
    return batch.value + (carrier - carrier.detach())  # to the bit, whatever the factors
