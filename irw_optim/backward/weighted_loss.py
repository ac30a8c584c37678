"""From a batch of losses to a scalar whose gradient is made when the backward pass arrives at it.

A scheme decides the weights of a batch. A `Weigher` knows what the batch is (a backward pass, some,
or those of all processes) and how long the step: it gives the factor on each loss's gradient.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.loss_gradients import LossGradients
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.torch_internals import graph_is_kept, uncompiled, will_run
from irw_optim.weighting import NoRows, Scheme, StepRecord

Note = Callable[[StepRecord], None]


class Pass(NamedTuple):
    """The losses of one backward pass, without their graph."""

    batch: PerSampleLosses
    factor: Tensor | float  # what arrived at the scalar: a gradient scaler's, 1/accumulation


def as_one(passes: Sequence[Pass]) -> PerSampleLosses:
    """The samples of all passes; of several, ``value`` and ``scale`` have no meaning."""
    if len(passes) == 1:
        return passes[0].batch
    batches = [batch for batch, _ in passes]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    counted = any(batch.counts is not None for batch in batches)
    return PerSampleLosses(
        torch.cat([batch.losses for batch in batches]),
        batches[0].value,
        1.0,
        torch.cat(labels) if len(labels) == len(batches) else None,
        torch.cat(list(map(counts_of, batches))) if counted else None,
    )


def some_of(batch: PerSampleLosses, rows: slice | Tensor) -> PerSampleLosses:
    """Some samples, or all in another order."""
    counts = counts_of(batch)[rows]
    return batch._replace(
        losses=batch.losses[rows],
        labels=None if batch.labels is None else batch.labels[rows],
        counts=None if batch.counts is None else counts,
        elements=float(counts.sum()),
    )


def elements_of(batch: PerSampleLosses) -> float:
    """How many elements the samples have together."""
    return float(len(batch.losses) if batch.elements is None else batch.elements)


def counts_of(batch: PerSampleLosses) -> Tensor:
    """How many elements each sample has, also where they are equally many: (B,) int64."""
    if batch.counts is not None:
        return batch.counts
    each = round(elements_of(batch) / max(1, len(batch.losses)))
    return torch.full_like(batch.losses, each, dtype=torch.int64)


class Weigher(Protocol):
    """Decides for passes together."""

    scheme: Scheme
    note: Note

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """The factor on the gradient of every loss of the passes, (B,)."""

    def loss(self, batch: PerSampleLosses) -> Tensor:
        """The criterion's value with the weighted gradient, by the losses alone."""


class OneProcess:
    """Weighs the samples at hand; ``note`` is told in the backward pass."""

    def __init__(self, scheme: Scheme, note: Note) -> None:
        self.scheme = scheme
        self.note = note

    def coefficients(self, passes: Sequence[Pass], rows: PerSampleGradients) -> Tensor:
        """Weights times the ordinary length."""
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
        """With weights that are known before."""
        record = self.scheme.decide(batch, NoRows(len(batch.losses)))
        loss = with_gradient(batch, record.weights * batch.scale)
        loss.register_hook(lambda _: self.note(record))
        return loss


class Deferred:
    """What a loss does when its backward pass arrives."""

    ALREADY_PASSED = (
        "this loss was already backpropagated: its graph is gone; use "
        "loss.backward(retain_graph=True) the first time"
    )
    ERROR: ClassVar[type[Exception]] = RuntimeError

    captured: LossGradients | None = None  # held until the pass is over
    passed = False  # whether it has happened

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
        """The gradient of every leaf, for that of the scalar loss."""
        raise NotImplementedError

    def leave(self) -> None:
        if self.captured is not None:
            self.captured.close()


@dataclass(eq=False)
class BatchPass(Deferred):
    """The backward pass of one batch that is weighed."""

    batch: PerSampleLosses
    captured: LossGradients = field()
    scored: Callable[[Tensor], bool]  # which leaves' gradients make the score
    weigher: Weigher  # chooses the factors when the gradients are known


@dataclass(eq=False)
class WeightedPass(BatchPass):
    """One that is weighed by itself."""

    leaves: Sequence[Tensor]

    def arrive(self, upstream: Tensor, keep_graph: bool) -> list[Tensor | None]:
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

    What is not the model's (inputs, other networks) gets the ordinary one.
    """
    leaves = (*captured.leaves, *captured.others)
    weighted = WeightedPass(batch, captured, scored, weigher, leaves)
    return _DeferredLoss.apply(batch.value, weighted, *leaves)  # type: ignore[no-untyped-call, no-any-return]


def deferred_loss(value: Tensor, deferred: Deferred, leaves: Iterable[Tensor]) -> Tensor:
    """A scalar whose gradients of the leaves are made when its backward pass arrives.

    Whatever listens to autograd (hooks on parameters, DistributedDataParallel) hears these.
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
    """The factor that every loss carries through its backward pass: the ordinary mean's.

    So hooks on activations hear gradients of the usual size, and half precision gets a gradient
    scaler's scale. 0 would take the weights with it.
    """
    scale, size = batch.scale, max(1, batch.losses.shape[0])
    if upstream.device.type == "cpu":  # looking at it waits for nothing there
        seed = upstream * (scale / size)
        value = seed.item()
        return seed if value and isfinite(value) else torch.ones_like(seed)
    if isinstance(scale, Tensor):
        upstream, scale = upstream * scale, 1.0
    seed = torch.rsub(upstream, LEAST, alpha=-scale / size).nan_to_num(1.0, 1.0, 1.0)
    return seed.masked_fill(seed == 0, 1.0) if seed.dtype is torch.float16 else seed


LEAST = 1e-32
"""In place of 0: lost in the sum with any other factor, and 0 in float16."""


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Products have the precision of the tensors, or better."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def ordinary_loss(batch: PerSampleLosses) -> Tensor:
    """The criterion's value with its own gradient."""
    return with_gradient(batch, batch.ordinary_factors())


def with_gradient(batch: PerSampleLosses, factors: Tensor) -> Tensor:
    """The criterion's value, with these factors on the gradient of every loss, (B,)."""
    carrier = (factors.to(batch.losses.dtype) * batch.losses).sum()
    return batch.value + (carrier - carrier.detach())  # to the bit, whatever the factors
