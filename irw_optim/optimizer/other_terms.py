"""Other terms of the total loss, which nobody weighs: said once, with their share.

``criterion(out, y) + penalty(out)`` is a feature: the penalty's gradient is added as it is. But
``criterion(out, y) + dice(out, y)`` looks the same, and only half of it is weighed. The first
backward pass is compared with what `p.grad` has grown by at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.protocol import widened
from irw_optim.torch_internals import at_the_end_of_backward

logger = logging.getLogger("irw_optim")

NOTED_FROM = 1e-3
"""Share of the gradient from which other terms are worth a word; rounding is far below."""


class OtherTerms:
    """Watches one backward pass, whichever losses it comes from."""

    def __init__(self) -> None:
        self.watching = True  # until it is known whether there are others
        self._weighted: dict[Tensor, Tensor] = {}
        self._before: dict[Tensor, Tensor | None] = {}

    def watch(self, loss: Tensor) -> None:
        """Be told what a weighted loss gives its leaves."""
        node: Any = loss.grad_fn
        leaves = getattr(getattr(node, "deferred", None), "leaves", ())
        if leaves:
            node.register_prehook(self._begin)
            node.register_hook(partial(self._note, leaves))

    def _begin(self, _: object) -> None:
        """A weighted loss is reached by a backward pass, at whose end to compare."""
        if self.watching:
            at_the_end_of_backward(self._compare)

    def _note(
        self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], _: object
    ) -> None:
        """Take the gradients that a weighted loss gives."""
        given = gradients[-len(leaves) :] if self.watching else ()
        for leaf, gradient in zip(leaves, given, strict=False):
            # A hook on the leaf has a say in what it gets.
            changed = leaf._backward_hooks or leaf._post_accumulate_grad_hooks
            if gradient is None or gradient.is_sparse or changed:
                continue
            if leaf in self._weighted:
                gradient = self._weighted[leaf] + gradient
            else:
                self._before[leaf] = None if leaf.grad is None else leaf.grad.clone()
            self._weighted[leaf] = gradient

    def _compare(self) -> None:
        weighted, before = self._weighted, self._before
        self._weighted, self._before = {}, {}
        if not weighted:
            return
        self.watching = False
        squares: list[Tensor] = []
        for leaf, gradient in weighted.items():
            if leaf.grad is None:  # `autograd.grad`
                continue
            then = before[leaf]
            grown = leaf.grad if then is None else leaf.grad - then
            squares += [_square(grown), _square(grown - gradient)]
        found = torch.stack(squares).tolist() if squares else []  # which waits for a device, once
        total, others = sum(found[::2]), sum(found[1::2])
        if others > NOTED_FROM**2 * total:
            logger.warning(
                "other terms of the total loss reach the parameters beside the weighted one. Their "
                "gradient is added as it is, unweighted: in this step it has %.0f %% of the "
                "length of the whole. For a regulariser that is as it should be. If they are "
                "losses of the samples, weigh them too: criterion=PerSampleLoss(lambda output, "
                "target: first(output, target) + second(output, target)), each with one loss per "
                "sample",
                100 * (others / total) ** 0.5,
            )


def _square(tensor: Tensor) -> Tensor:
    return widened(tensor.detach()).abs().square().sum().float()
