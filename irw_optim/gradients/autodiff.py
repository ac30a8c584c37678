"""The autodiff engine: G's products for any model, from the graph of the losses alone.

``G^T u`` is a backward pass, ``G v`` what a direction v, pushed forwards through the graph, does to
the losses. Where an operation can only be pulled back, a backward pass a sample is exact too.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from irw_optim.torch_internals import copies, lengths

from .backward_passes import BackwardPasses
from .graph import walk
from .hooks import IN_CUDNN
from .places import places_of
from .protocol import Direction, MaterializedGradients, as_vector, blocked_gram, wide, widened
from .pushforward import NoPushForwardError

logger = logging.getLogger("irw_optim")


class AutodiffGradients:
    """Per-sample gradients through autograd itself, which keeps the graph of the losses, (B,).

    ``known`` is remembered from step to step; ``passes`` are unheard by hooks on activations.
    """

    def __init__(
        self,
        losses: Tensor,
        parameters: Sequence[Tensor],
        known: dict[str, bool] | None = None,
        passes: BackwardPasses | None = None,
    ) -> None:
        self.losses = losses
        self.parameters = list(parameters)
        self.batch_size = len(losses)
        self.known = {} if known is None else known
        own = BackwardPasses(losses, walk(losses), self.known) if passes is None else passes
        self._pull_back = own.with_hooks if passes is None else own.without_hooks
        self._passes = own
        self._newest: tuple[Tensor, dict[Tensor, Tensor]] | None = None
        self.doubt: Sequence[Tensor] = ()
        self._squared = False  # whether the last of these are lengths, to be squared
        self._row_by_row = False  # in this step, whatever is known

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        combined = self._backward(weights)
        if places_of(self._passes.graph).in_python:  # CUDA graphs write where they did before
            combined = dict(zip(combined, copies(combined.values()), strict=True))
        self._newest = weights, combined
        return combined

    def dot(self, direction: Direction) -> Tensor:
        return self._scores(direction, waits=True)

    def align(self, coefficients: Tensor) -> Tensor:
        """On a device it is not waited for whether that `adds_up`."""
        return self._scores(self.combine(coefficients), waits=self.losses.device.type == "cpu")

    def _scores(self, direction: Direction, *, waits: bool) -> Tensor:
        if not self.batch_size:
            return widened(self.losses.detach())
        if not (self._row_by_row or self.known.get("row_by_row")):
            mine = {p: direction[p] for p in self.parameters if p in direction}
            try:
                scores = widened(self._passes.push(mine))
            except NoPushForwardError as error:
                self._go_row_by_row(str(error))
            else:
                sides = self._both_sides(scores, mine)
                if not waits:
                    self.doubt = sides
                    return scores
                if not sides or self.adds_up(torch.cat(sides).cpu()):
                    return scores
                self.settle_doubt()
        rows = (self._row(i) for i in range(self.batch_size))
        scores = torch.stack([_inner(row, direction) for row in rows])
        sides = self._both_sides(scores, direction)
        if sides and not self.known.get(_NOT_LINEAR) and not self.adds_up(torch.cat(sides).cpu()):
            self.known[_NOT_LINEAR] = True
            logger.warning(_NOT_LINEAR)
        return scores

    def settle_doubt(self) -> None:
        """Take the scores row by row from now on.

        In this step alone if both sides added up before: then its gradients are all rounding.
        """
        self.doubt, self._row_by_row = (), True
        if not self.known.get("adds up"):
            self._go_row_by_row("a change goes forwards otherwise than its gradient goes back")

    def gram(self) -> Tensor:
        numbers = sum(p.numel() for p in self.parameters)
        return blocked_gram(self.batch_size, numbers, self.rows)

    def _both_sides(self, scores: Tensor, direction: Direction) -> list[Tensor]:
        """u, G v, and what makes (G^T u)^T v: that, or for v = G^T u the lengths of its parts.

        For `adds_up`: some operations hide that they cannot be pushed through.
        """
        if self._newest is None:
            return []
        weights, combined = self._newest
        pairs = [(combined[p], v) for p, v in direction.items() if p in combined]
        self._squared = bool(pairs) and all(g is v for g, v in pairs)
        own = lengths(widened(g) for g, _ in pairs) if self._squared else []
        sides = weights, scores, *(own or [_inner(combined, direction)])
        return [t.flatten().to(scores.dtype) for t in sides]

    def adds_up(self, sides: Tensor) -> bool:
        """Whether u^T (G v) and the other are equal, or not finite, which the step tells."""
        weights, scores, others = sides.tensor_split([self.batch_size, 2 * self.batch_size])
        other = (others.square() if self._squared else others).sum().item()
        products = weights * scores
        one, terms = products.sum().item(), products.abs().sum().item()
        dtype = self.losses.dtype
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(dtype, 1e-1)
        rounding = torch.finfo(wide(dtype)).tiny  # of numbers below it
        same = not math.isfinite(other) or abs(one - other) <= tolerance * terms + rounding
        if same and terms > rounding:
            self.known["adds up"] = True
        return same

    def _go_row_by_row(self, reason: str) -> None:
        if self.batch_size < 2:
            return  # others may do without
        self.known["row_by_row"] = True
        self.known[IN_CUDNN] = IN_CUDNN in reason
        logger.warning(
            "an operation of this model has no double backward (%s): scores take one backward pass "
            "a sample from now on, %d a step here, exact but slow. Avoid it by "
            'score_parameters="last", or a backward that can be differentiated',
            reason,
            self.batch_size,
        )

    def _backward(self, weights: Tensor) -> dict[Tensor, Tensor]:
        gradients = self._pull_back(self.parameters, weights)
        return {
            p: torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(self.parameters, gradients, strict=True)
        }

    def _row(self, sample: int) -> dict[Tensor, Tensor]:
        one = torch.zeros_like(self.losses)
        one[sample] = 1
        return self._backward(one)

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        """One backward pass a sample: (b, *p.shape)."""
        chosen = range(self.batch_size)[samples]
        blocks = {p: p.new_empty(len(chosen), *p.shape) for p in self.parameters}
        for place, sample in enumerate(chosen):
            for p, gradient in self._row(sample).items():
                blocks[p][place] = gradient
        return blocks


def materialized_by_loop(losses: Tensor, parameters: Sequence[Tensor]) -> MaterializedGradients:
    """G by plain autograd, one sample after the other: the definition, and the reference.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> losses = torch.tensor([[1.0, 0.0], [0.0, 3.0]]) @ weight
    >>> materialized_by_loop(losses, [weight]).rows[weight]
    tensor([[1., 0.],
            [0., 3.]])
    """
    return MaterializedGradients(AutodiffGradients(losses, parameters).rows())


_NOT_LINEAR = (
    "a backward of this model is not linear (it clips, or takes a norm): the step is that of the "
    "weighted losses, and no weighted sum of the samples' gradients"
)


def _inner(row: dict[Tensor, Tensor], direction: Direction) -> Tensor:
    pairs = [(g, direction[p]) for p, g in row.items() if p in direction]
    products = [(as_vector(widened(g)) * as_vector(widened(v))).sum() for g, v in pairs]
    return sum(products, start=as_vector(widened(next(iter(row.values())))).new_zeros(()))
