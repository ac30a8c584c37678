"""Criteria that are the user's own: a function of per-sample losses, or a module, checked.

A criterion that reduces over the batch itself (a Dice loss with ``batch=True``) returns one number
a class; with as many classes as samples nothing about the shape is odd. So the samples change
places: losses that are theirs go along, a sum over the batch stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from irw_optim.criterion._calls import is_due, rehearsal
from irw_optim.criterion._rules import (
    RULES,
    PerSampleLosses,
    Rule,
    forward_of,
    plain,
    unreduced,
)

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


RULES[PerSampleLoss] = Rule(plain, trusted=False)


def with_own_value(
    criterion: Any,
    own: object,
    result: PerSampleLosses,
    elements: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PerSampleLosses:
    """The losses of a module that is not torch's, with the value ``own`` that itself returns.

    Its value must be the mean or the sum that it claims, at every call: a mean that is weighted
    (over a mask, say), or a penalty added on top, would otherwise go unnoticed.

    Raises:
        ValueError: If it is another one than that of the elements, of which `result` was folded.
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
    """Checks that a custom criterion computes floating-point numbers, one or a row per sample."""
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
    """
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.dim()]
    predicted = any(t.requires_grad for t in tensors)
    sizes = {len(t) for t in tensors if not (predicted and _may_be_of_classes(t))}
    if sizes and elements.shape[0] not in sizes:
        raise ValueError(
            f"{type(criterion).__name__} returned losses of shape {tuple(elements.shape)}, but its "
            f"arguments have leading dimensions {sorted(sizes)}: return {_SHAPE}, or give "
            "per_sample_losses(..., batch_size=B) to fold them"
        )


_checked: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

_FAR_CLOSER = 0.1
"""How much closer to one of two expectations than these are to each other, to decide for it."""


def check_rows_are_samples(
    criterion: nn.Module,
    elements: Tensor,
    batch: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Checks at uses 1, 2, 4, 8, ... that the losses go along when the samples change places.

    Where that cannot be told, because the criterion raises, draws numbers, or has no two losses
    that differ, nothing is said.
    """
    if not is_due(criterion, _checked):
        return
    # As many calls whatever the numbers are: a criterion may gather from other processes.
    calls = [_called_again(criterion, args, kwargs, m) for m in _moves(len(elements), batch)]
    if batch < 2:
        return
    elements = elements.detach()
    along = elements.roll(len(elements) // batch, 0)
    near = _FAR_CLOSER * _distance(elements, along)
    moved = [other for other in calls if other is not None and other.shape == elements.shape]
    if any(_distance(other, along) <= near for other in moved):
        return
    if any(_distance(other, elements) <= near for other in moved):
        raise ValueError(
            f"{type(criterion).__name__} returned losses of shape {tuple(elements.shape)} that "
            "stay as they are when the samples of the batch change places: they are not one loss "
            "per sample, but reduced over the batch (as by the batch=True of a Dice loss). Return "
            "losses of shape (B,) or (B, ...), from a function as PerSampleLoss(fn), or call "
            "optimizer.backward(losses) with losses of shape (B,)"
        )


def _moves(rows: int, batch: int) -> list[Callable[[object], object]]:
    """Everything that has a row a sample goes along; or all but what may be a number a class."""

    def move(value: object) -> object:
        if isinstance(value, Tensor):
            if not value.dim() or len(value) not in (rows, batch):
                return value
            return value.detach().roll(len(value) // max(1, batch), 0)
        if not isinstance(value, list | tuple) or len(value) != batch:
            return None
        batches = any(isinstance(v, Tensor) and v.dim() and len(v) == batch for v in value)
        return None if batches else [value[-1], *value[:-1]]

    def move_samples(value: object) -> object:
        return value if isinstance(value, Tensor) and _may_be_of_classes(value) else move(value)

    return [move, move_samples]


def _may_be_of_classes(tensor: Tensor) -> bool:
    """Whether it may hold one number a class."""
    return tensor.dim() == 1 and tensor.is_floating_point() and not tensor.requires_grad


def _mapped(value: Any, move: Callable[[object], object]) -> Any:
    """The value with `move` applied to every tensor, and to every list that is one of samples."""
    moved = move(value)
    if moved is not None:
        return moved
    if isinstance(value, Mapping):
        return type(value)({name: _mapped(v, move) for name, v in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        parts = [_mapped(v, move) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _called_again(
    criterion: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    move: Callable[[object], object],
) -> Tensor | None:
    """The elements for other arguments; None where the criterion cannot be called with them."""
    with rehearsal(criterion, (*args, *kwargs.values())), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                return unreduced(criterion, _mapped(args, move), _mapped(kwargs, move))
        except Exception:  # whatever another's code raises: it says nothing about the samples
            return None


def _distance(left: Tensor, right: Tensor) -> float:
    """The largest difference; none between infinite numbers that are equal."""
    difference = (left - right).masked_fill(left == right, 0)
    return float(difference.abs().max()) if left.numel() else 0.0
