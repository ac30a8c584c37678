"""Whether what is at hand is what is weighed: losses, ``p.grad`` and rows."""

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from irw_optim.gradients.engine import Engine
from irw_optim.gradients.graph import walk
from irw_optim.gradients.mixing import follow_batch
from irw_optim.gradients.protocol import widened
from irw_optim.torch_internals import at_the_end_of_backward

logger = logging.getLogger("irw_optim")

NOTED_FROM = 1e-3  # of the gradient: the share of other terms; rounding is far below
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
_TOLERANCE_OF_HALF = 5e-2  # of the root mean square of the rows' norms


def check_backward(engine: Engine, losses: Tensor) -> None:
    """Refuse losses that lead nowhere, and any to an optimizer for way 3."""
    if not losses.requires_grad:
        raise RuntimeError(
            "losses do not require a gradient: expected losses computed from the model under "
            "torch.enable_grad(), without .detach() or .item()"
        )
    if engine.kind == "grad_sample":
        raise ValueError(
            "engine='grad_sample' reads what Opacus left in p.grad_sample: expected "
            "losses.mean().backward() and optimizer.step(losses=losses); or leave engine out for "
            "optimizer.backward(losses)"
        )


def check_reads_rows(engine: Engine) -> None:
    """Refuse way 3 to an optimizer that makes the rows itself."""
    if engine.kind in ("ghost", "autodiff"):
        raise ValueError(
            f"engine={engine.kind!r} is for gradients made here, and step(losses=losses) reads "
            "what Opacus left in p.grad_sample: expected optimizer.backward(losses) and step(), "
            "or engine='grad_sample'"
        )


def check_unrecorded(parameters: Sequence[Tensor], model: nn.Module | None, passed: bool) -> bool:
    """Whether gradients without a record are more than zeros; raise if they were not weighted.

    They may be written back changed, as by gradient surgery, where a weighted backward pass has
    ``passed``. torch's distributed checkpoints step on zeros to make a state.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise RuntimeError(f"step() found no gradient: {_expected(model)}")
    if not any(map(has_gradient, parameters)):
        return False
    if not passed:
        raise RuntimeError(
            f"step() found a gradient without weights: {_expected(model)}. For a plain step "
            "on purpose call optimizer.inner.step()"
        )
    broken = [g for g in gradients if not bool(stored_in(g).isfinite().all())]
    if broken:
        raise FloatingPointError(
            f"the gradients written back to {len(broken)} parameters are not finite (the first "
            f"has shape {tuple(broken[0].shape)}): nothing was updated"
        )
    return True


def _expected(model: nn.Module | None) -> str:
    way_1 = "IRWOptimizer(..., model=model, criterion=criterion)"
    call = "criterion(model(x), y).backward()"
    if model is None:
        what = f"no criterion is attached, so expected {way_1} and {call}"
    elif not model.training:
        what = (
            "the model is in eval mode, where nothing is weighed, so expected train mode, "
            f"model.train(), before {call}"
        )
    else:
        what = (
            f"expected {call} on the very criterion of {way_1}, called after that line and not "
            "given to a newer IRWOptimizer since"
        )
    return f"{what}; optimizer.backward(losses), or step(losses=losses) after Opacus"


def has_gradient(parameter: Tensor) -> bool:
    """Whether there is a gradient that is not zero."""
    gradient = parameter.grad
    return gradient is not None and bool(stored_in(gradient).any())


def stored_in(gradient: Tensor) -> Tensor:
    """Those that a gradient stores, whatever its layout."""
    if gradient.layout is torch.strided:
        return gradient
    return (gradient.coalesce() if gradient.is_sparse else gradient).values()


def check_rows(rows: dict[Tensor, Tensor]) -> None:
    """Refuse rows, (B, *p.shape) by parameter, that are not those of the gradient, if one is there.

    It was scaled or clipped since backward, or has parts of which the layers' hooks did not hear.
    """
    size = len(next(iter(rows.values()))) if rows else 0
    if not size:
        return
    product = grads = means = squares = 0.0
    for parameter, row in rows.items():
        mean = row.float().mean(0) if row.element_size() < 4 else row.mean(0)
        squares += float(row.flatten(1).norm(dim=1).double().square().mean())
        means += float(mean.norm()) ** 2
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense().to(mean)
            grads += float(gradient.norm()) ** 2
            product += float((gradient * mean).sum())
    if not (grads and means and math.isfinite(grads + means + squares)):
        return
    factor = product / means
    tolerance = max(_TOLERANCE.get(row.dtype, _TOLERANCE_OF_HALF) for row in rows.values())
    unit = tolerance * (squares / means) ** 0.5 * abs(factor)
    off = max(0.0, grads / means - factor**2) ** 0.5
    if off > unit:
        raise RuntimeError(
            f"p.grad is not the mean of p.grad_sample: it differs by {off / abs(factor):.2g} of "
            "it. Opacus' rows have no part of other terms of the loss, nor of parameters used "
            f"outside their layers: {_INSTEAD}"
        )
    if min(abs(factor - 1), abs(factor - size)) > unit:
        raise RuntimeError(
            f"p.grad is {factor:.3g} times the mean of p.grad_sample: a gradient scaler, or "
            f"clipping, has changed the one and not the other: {_INSTEAD}, with both as always"
        )


_INSTEAD = (
    "expected losses.mean().backward(), and step(losses=losses) at once; or let IRWOptimizer make "
    "the gradients, IRWOptimizer(..., model=model) with the plain model and "
    "optimizer.backward(losses)"
)


def warn_of_mixing(losses: Tensor, engine: Engine) -> None:
    """Say where samples may meet, of which rows show nothing."""
    if losses.grad_fn is None or len(losses) < 2:
        engine.tell(
            logging.INFO,
            "rows",
            "Opacus' rows are taken as they are: only a forward that does not mix samples has "
            "exact ones, and losses without their graph do not show it; irw_optim.verify(model, "
            "...) on the plain model does",
        )
        return
    batch = follow_batch(losses, walk(losses))
    if batch.mixed_by is not None or batch.computes_shared:
        where = batch.mixed_by or "what is computed for all samples together"
        engine.tell(
            logging.WARNING,
            "rows",
            f"samples may meet in the forward (at {where}), and then Opacus' rows are not the "
            "gradients of single losses: irw_optim.verify(model, ...) on the plain model tells; "
            "IRWOptimizer(..., model=model, criterion=criterion) is exact, too",
        )


class OtherTerms:
    """Says once, with their share, that other terms of the total loss are not weighed.

    For ``+ penalty(out)`` that is a feature, and ``+ dice(out, y)`` looks the same.
    """

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
        if self.watching:
            at_the_end_of_backward(self._compare)

    def _note(self, leaves: Sequence[Tensor], gradients: Sequence[Any], _: object) -> None:
        given = gradients[-len(leaves) :] if self.watching else ()
        for leaf, gradient in zip(leaves, given, strict=False):
            # A hook on the leaf has a say in what it gets.
            changed = leaf._backward_hooks or leaf._post_accumulate_grad_hooks
            if gradient is None or gradient.layout is not torch.strided or changed:
                continue
            if leaf in self._weighted:
                gradient = self._weighted[leaf] + gradient
            else:
                self._before[leaf] = None if leaf.grad is None else leaf.grad.clone()
            self._weighted[leaf] = gradient

    def _compare(self) -> None:
        weighted, before = self._weighted, self._before
        self._weighted, self._before = {}, {}
        self.watching = self.watching and not weighted
        squares: list[Tensor] = []
        for leaf, gradient in weighted.items():
            if leaf.grad is not None:  # else `autograd.grad` took it
                then = before[leaf]
                grown = leaf.grad if then is None else leaf.grad - then
                parts = (widened(part.detach()) for part in (grown, grown - gradient))
                squares += [part.abs().square().sum().float() for part in parts]
        found = torch.stack(squares).tolist() if squares else []  # which waits for a device, once
        total, others = sum(found[::2]), sum(found[1::2])
        if others > NOTED_FROM**2 * total:
            logger.warning(
                "other terms of the total loss reach the parameters beside the weighted one. Their "
                "gradient is added as it is: in this step it has %.0f %% of the length of the "
                "whole. For a regulariser that is as it should be. If they are losses of the "
                "samples, weigh them too: criterion=PerSampleLoss(lambda output, target: "
                "first(output, target) + second(output, target)), each with one loss per sample",
                100 * (others / total) ** 0.5,
            )
