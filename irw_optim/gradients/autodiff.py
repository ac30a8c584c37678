"""The autodiff engine: G's products for any model, from the graph of the losses alone.

``u -> G^T u`` is what a backward pass with ``grad_outputs=u`` computes. It is linear in u, so its
own derivative along a direction v is G v: double backward gives all B scores at once, through
BatchNorm's batch statistics, recurrent cells, tied or functionally used weights alike. Where an
operation has no double backward, one backward pass a sample is exact too, only slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from irw_optim.gradients.materialized import (
    MaterializedGradients,
    as_vector,
    blocked_gram,
    widened,
)
from irw_optim.gradients.protocol import Direction

logger = logging.getLogger("irw_optim")

PullBack: TypeAlias = Callable[[Sequence[Tensor], Tensor, bool], Sequence[Tensor | None]]
"""``pull_back(leaves, weights, create_graph)``: the gradient of <weights, losses> for each leaf."""


class AutodiffGradients:
    """Per-sample gradients through autograd itself; keeps the graph of the losses.

    Args:
        losses: (B,), attached to their graph.
        parameters: leaves of that graph.
        known: what is remembered from step to step; ``known["row_by_row"]`` is set once an
            operation without double backward was met.
        pull_back: ``pull_back(parameters, weights, create_graph)``, the backward pass to take;
            None for autograd's own, which hooks on activations hear.
    """

    def __init__(
        self,
        losses: Tensor,
        parameters: Sequence[Tensor],
        known: dict[str, bool] | None = None,
        pull_back: PullBack | None = None,
    ) -> None:
        self.losses = losses
        self.parameters = list(parameters)
        self.batch_size = len(losses)
        self.known = {} if known is None else known
        self.pull_back = partial(_by_autograd, losses) if pull_back is None else pull_back
        self._linear_map: tuple[Tensor, dict[Tensor, Tensor]] | None = None

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        # Copies: recorded graphs (CUDA) write into the same memory at every pass.
        if self.known.get("row_by_row") or self._linear_map is not None:
            return {p: g.clone() for p, g in self._backward(weights).items()}
        u = weights.detach().to(self.losses.dtype).clone().requires_grad_()
        combined = self._backward(u, create_graph=True)
        self._linear_map = u, combined
        return {p: g.detach().clone() for p, g in combined.items()}

    def dot(self, direction: Direction) -> Tensor:
        if not self.batch_size:  # not every operation has a double backward of nothing
            return widened(self.losses.detach())
        if not self.known.get("row_by_row"):
            try:
                scores = self._dot_by_double_backward(direction)
            except RuntimeError as error:
                if not _lacks_double_backward(error):
                    raise
                self._go_row_by_row(str(error).splitlines()[0])
            else:
                if self._adds_up(scores, direction):
                    return scores
                self._go_row_by_row("its derivative misses terms, without an error")
        rows = (self._row(i) for i in range(self.batch_size))
        return torch.stack([_inner(row, direction) for row in rows])

    def gram(self) -> Tensor:
        numbers = sum(p.numel() for p in self.parameters)
        return blocked_gram(self.batch_size, numbers, self.rows)

    def _dot_by_double_backward(self, direction: Direction) -> Tensor:
        u, combined = self._linear()
        pairs = [(combined[p], v) for p, v in direction.items() if p in combined]
        outputs = [(g, v) for g, v in pairs if g.requires_grad]
        if not outputs:
            return widened(torch.zeros_like(u))
        (scores,) = torch.autograd.grad(
            [g for g, _ in outputs],
            u,
            [v.to(g.dtype) for g, v in outputs],
            retain_graph=True,
            allow_unused=True,
        )
        return widened(torch.zeros_like(u) if scores is None else scores)

    def _adds_up(self, scores: Tensor, direction: Direction) -> bool:
        """Whether u^T (G v) = (G^T u)^T v.

        Some operations hide that they have no double backward: the graph just ends there, or is
        wrong, and nothing raises. Both sides are at hand, so every step can afford to look.
        """
        u, combined = self._linear()
        terms = u.detach() * scores
        expected = _inner({p: g.detach() for p, g in combined.items()}, direction)
        if not bool(expected.isfinite()):
            return True  # not finite either way, which is for the step to say
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(self.losses.dtype, 1e-1)
        rounding = torch.finfo(terms.dtype).tiny  # of numbers below it
        return bool((terms.sum() - expected).abs() <= tolerance * terms.abs().sum() + rounding)

    def _go_row_by_row(self, reason: str) -> None:
        self.known["row_by_row"] = True
        self._linear_map = None
        logger.warning(
            "an operation of this model has no double backward (%s): scores are taken one "
            "backward pass a sample from now on, exact but slow. score_parameters= (the last "
            "layer, say), or attention under sdpa_kernel(SDPBackend.MATH), avoids this",
            reason,
        )

    def _linear(self) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """The vector u and G^T u with its graph; any u does, since the map is linear."""
        if self._linear_map is None:
            self.combine(torch.ones_like(self.losses))
        assert self._linear_map is not None
        return self._linear_map

    def _backward(self, weights: Tensor, create_graph: bool = False) -> dict[Tensor, Tensor]:
        gradients = self.pull_back(self.parameters, weights, create_graph)
        return {
            p: torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(self.parameters, gradients, strict=True)
        }

    def _row(self, sample: int) -> dict[Tensor, Tensor]:
        one = torch.zeros_like(self.losses)
        one[sample] = 1
        return self._backward(one)

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        """The per-sample gradients of some samples, one backward pass each: (b, *p.shape)."""
        chosen = range(self.batch_size)[samples]
        blocks = {p: p.new_empty(len(chosen), *p.shape) for p in self.parameters}
        for place, sample in enumerate(chosen):
            for p, gradient in self._row(sample).items():
                blocks[p][place] = gradient
        return blocks


def _by_autograd(
    losses: Tensor, leaves: Sequence[Tensor], weights: Tensor, create_graph: bool
) -> Sequence[Tensor | None]:
    return backward_to(leaves, losses, weights, retain_graph=True, create_graph=create_graph)


def backward_to(
    leaves: Sequence[Tensor],
    losses: Tensor,
    weights: Tensor,
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """A backward pass of autograd's: the gradient of <weights, losses>, unheard by the leaves.

    A hook on a parameter belongs to the gradient that the parameter finally gets. Here it would be
    called besides, with something else, and what it returns would change the result.
    """
    with silent(leaves), torch.enable_grad():
        return torch.autograd.grad(
            losses,
            leaves,
            weights.to(losses.dtype),
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )


@contextmanager
def silent(leaves: Sequence[Tensor]) -> Iterator[None]:
    """The leaves' hooks are not called."""
    hooks = [p._backward_hooks for p in leaves if p._backward_hooks]
    saved = [(table, dict(table)) for table in hooks]
    for table in hooks:
        table.clear()
    try:
        yield
    finally:
        for table, entries in saved:
            table.update(entries)


def materialized_by_loop(losses: Tensor, parameters: Sequence[Tensor]) -> MaterializedGradients:
    """G by plain autograd, one sample after the other: the definition, and the reference.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> losses = torch.tensor([[1.0, 0.0], [0.0, 3.0]]) @ weight
    >>> materialized_by_loop(losses, [weight]).rows[weight]
    tensor([[1., 0.],
            [0., 3.]])
    """
    engine = AutodiffGradients(losses, parameters, {"row_by_row": True})
    return MaterializedGradients(engine.rows())


def _inner(row: dict[Tensor, Tensor], direction: Direction) -> Tensor:
    pairs = [(g, direction[p]) for p, g in row.items() if p in direction]
    products = [(as_vector(widened(g)) * as_vector(widened(v))).sum() for g, v in pairs]
    return sum(products, start=as_vector(widened(next(iter(row.values())))).new_zeros(()))


def _lacks_double_backward(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "derivative for" in text or "double backward" in text or "differentiated twice" in text
