"""Criteria that are the user's own: a function of per-sample losses, or a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from irw_optim.criterion._calls import forward_of, rehearsal, unreduced
from irw_optim.criterion._folding import PerSampleLosses
from irw_optim.criterion._rules import plain, rule_for

_SHAPE = "one loss per sample, of shape (B,) or (B, ...)"


class PerSampleLoss(nn.Module):
    """A criterion out of a function that returns one loss per sample.

    Called, it returns the ordinary scalar, so it is used in a training loop like any other
    criterion; handed to ``IRWOptimizer(criterion=...)``, its per-sample losses are known.

    Args:
        function: Maps the criterion's arguments to differentiable losses of shape (B,), or
            (B, ...), which are averaged over each sample. May be an ``nn.Module``.
        reduction: ``"mean"`` or ``"sum"`` over all losses.

    Raises:
        TypeError: If `function` is not callable.
        ValueError: If `reduction` is neither.

    Example:
        >>> import torch
        >>> from irw_optim.criterion import PerSampleLoss
        >>> criterion = PerSampleLoss(lambda output, target: (output - target).abs() ** 1.5)
        >>> criterion(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 0.0]))
        tensor(4.5000)
    """

    def __init__(self, function: Callable[..., Tensor], reduction: str = "mean") -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(
                f"function={function!r} cannot be called; PerSampleLoss takes a function that "
                "returns losses of shape (B,)"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'")
        self.function = function
        self.reduction = reduction

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The losses of `function`, reduced to a scalar."""
        losses = self.function(*args, **kwargs)
        if self.reduction == "none":  # only while per_sample_losses asks
            return losses
        check_elements(self, losses)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        """Names the function, which is no submodule as a rule, and the reduction."""
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{name}, reduction={self.reduction!r}"


rule_for(PerSampleLoss, trusted=False)(plain)


def with_own_value(
    criterion: Any,
    own: object,
    result: PerSampleLosses,
    elements: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PerSampleLosses:
    """The losses of a module that is not torch's, with the value that the module itself returns.

    Its value must be the mean or the sum that it claims, at every call: a mean that is weighted
    (over a mask, say), or a penalty added on top, would otherwise go unnoticed.

    Args:
        criterion: The module.
        own: What it returned for the same call.
        result: The losses, folded.
        elements: What they were folded from.
        args: What the criterion was called with.
        kwargs: What the criterion was called with.

    Raises:
        ValueError: If the criterion's own value is another one.
    """
    if isinstance(own, Tensor) and own.dim() == 0:
        if _agree(criterion, own, elements):
            return result._replace(value=own)
        if _is_another_draw(criterion, args, kwargs):
            return result  # with the value that these elements would have come to
    shown = own.tolist() if isinstance(own, Tensor) else own
    name, reduction = type(criterion).__name__, criterion.reduction
    raise ValueError(
        f"{name} with reduction={reduction!r} returned {shown}, but the {reduction} of its losses "
        f"with reduction='none' is {result.value.item()}: its reduction is one of its own. Wrap a "
        "function that returns the unreduced losses in PerSampleLoss(fn), or call "
        "optimizer.backward(losses) with losses of shape (B,)"
    )


def _agree(criterion: nn.Module, own: Any, elements: Tensor) -> bool:
    """Whether a value is the mean or sum of the elements; broken elements say nothing."""
    elements = elements.detach()
    ours = plain(criterion, elements, 1).value
    size = plain(criterion, elements.abs(), 1).value  # of what may have cancelled in the sum
    close = (own - ours).abs() <= torch.finfo(ours.dtype).eps ** 0.5 * size
    return bool(close | ~ours.isfinite())


def _is_another_draw(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether value and elements differ because numbers were drawn anew in between.

    Drawn from the same random states they agree, or the elements differ from themselves.
    """

    def again(call: Callable[..., Any]) -> Any:
        with rehearsal(criterion, (*args, *kwargs.values())):
            return call().detach()

    elements, twin = (again(lambda: unreduced(criterion, args, kwargs)) for _ in range(2))
    own = again(lambda: forward_of(criterion)(*args, **kwargs))
    return not torch.equal(elements, twin) or _agree(criterion, own, elements)


def check_elements(criterion: nn.Module, elements: object) -> None:
    """Checks that what a custom criterion computes is one loss, or a row of them, per sample.

    Raises:
        TypeError: If it is not a tensor of floating-point numbers.
        ValueError: If it is a single number.
    """
    name = type(criterion).__name__
    if not (isinstance(elements, Tensor) and elements.is_floating_point()):
        got = elements.dtype if isinstance(elements, Tensor) else type(elements).__name__
        raise TypeError(f"{name} must return a floating-point tensor of {_SHAPE}, got {got}")
    if elements.dim() == 0:
        hint = (
            "its function must not reduce: give the loss inside it reduction='none'"
            if isinstance(criterion, PerSampleLoss)
            else "it does not honour reduction='none'; wrap a function that returns the unreduced "
            "losses in PerSampleLoss(fn), or call optimizer.backward(losses)"
        )
        raise ValueError(f"{name} returned a single number instead of {_SHAPE}: {hint}")


def check_leading_dimension(
    criterion: nn.Module, elements: Tensor, arguments: Iterable[object]
) -> None:
    """Checks that the losses have the leading dimension of one of the call's tensors, if any.

    Beside a prediction, vectors of numbers do not count: weights of the classes are no samples.

    Raises:
        ValueError: If they have not.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.dim()]
    if any(t.requires_grad for t in tensors):
        tensors = [
            t for t in tensors if t.requires_grad or t.dim() > 1 or not t.is_floating_point()
        ]
    sizes = {t.shape[0] for t in tensors}
    if sizes and elements.shape[0] not in sizes:
        raise ValueError(
            f"{type(criterion).__name__} returned losses of shape {tuple(elements.shape)}, but its "
            f"arguments have leading dimensions {sorted(sizes)}: return {_SHAPE}, or give "
            "per_sample_losses(..., batch_size=B) to fold them"
        )
