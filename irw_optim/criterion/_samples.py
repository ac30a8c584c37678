"""Whether the rows of what a custom criterion computes are the samples of its batch.

A criterion that reduces over the batch itself (a Dice loss with ``batch=True``) returns one number
a class; with as many classes as samples nothing about the shape is odd. So the samples change
places: losses that are theirs go along, a sum over the batch stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from irw_optim.criterion._calls import rehearsal, unreduced

_uses: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

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

    Args:
        criterion: one whose elements are its own affair.
        elements: Losses (batch · k, ...).
        batch: Number of samples B.
        args: What the criterion was called with.
        kwargs: What the criterion was called with.

    Raises:
        ValueError: If the losses stay as they are.
    """
    uses = _uses[criterion] = _uses.get(criterion, 0) + 1
    if uses & (uses - 1):
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

    def move_all_but_vectors(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 1:
            return move(value) if value.requires_grad else value
        return move(value)

    return [move, move_all_but_vectors]


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
