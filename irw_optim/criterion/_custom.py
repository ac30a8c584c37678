"""Criteria of the user's own, checked.

One that reduces over the batch itself (a Dice loss with ``batch=True``) returns a number a class,
which the shape may not tell. So it is called again with samples that have changed places: losses of
theirs go along, sums over the batch stay.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from irw_optim.restored import randomness_restored, undo_own_state, undo_state

from ._rules import RULES, PerSampleLosses, Rule, forward_of, plain, unreduced

_SHAPE = "one loss per sample, of shape (B,) or (B, ...)"
WAYS_OUT = (
    "wrap a function that returns losses of shape (B,) as PerSampleLoss(fn), or leave criterion "
    "out and call optimizer.backward(losses) in place of loss.backward()"
)


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
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                f"function={function!r}: expected a function, or an object that can be called, "
                "which returns losses of shape (B,)"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'")
        self.function = function
        self.reduction = reduction

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The losses, reduced to a scalar."""
        losses = self.function(*args, **kwargs)
        if self.reduction == "none":  # only while per_sample_losses asks
            return losses
        check_elements(self, losses)
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{name}, reduction={self.reduction!r}"


RULES[PerSampleLoss] = Rule(plain, trusted=False)


def value_of_its_own(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What the criterion itself returns, detached; the next call finds all as this one did.

    Gradients stay enabled: it may differentiate. Whether it draws from NumPy, whose state takes
    long to save, is looked at now and then, until it has.
    """
    looks = is_due(criterion, _uses) or criterion in _draw_from_numpy
    with rehearsal(criterion, (*args, *kwargs.values()), numpy=looks) as saved:
        own = forward_of(criterion)(*args, **kwargs)
        now: Any = np.random.get_state() if saved is not None else None
        if now and not (saved[2:] == now[2:] and np.array_equal(saved[1], now[1])):
            _draw_from_numpy.add(criterion)
    return own.detach() if isinstance(own, Tensor) else own


_uses: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_draw_from_numpy: WeakSet[nn.Module] = WeakSet()


def is_due(criterion: nn.Module, uses: WeakKeyDictionary[nn.Module, int]) -> bool:
    """Counts a use: the 1st, 2nd, 4th, 8th, ...?"""
    count = uses[criterion] = uses.get(criterion, 0) + 1
    return not count & (count - 1)


@contextmanager
def rehearsal(
    criterion: nn.Module, arguments: Iterable[object], *, numpy: bool = True
) -> Iterator[Any]:
    """Restores random states and what it and the modules that it calls keep; yields NumPy's."""
    undo = list(undo_state(criterion, by_version=True))
    known, here = set(criterion.modules()), get_ident()

    def before_a_call(module: nn.Module, _: object) -> None:
        if module not in known and get_ident() == here:
            known.add(module)
            undo.extend(undo_own_state(module, by_version=True))

    devices = {a.device for a in arguments if isinstance(a, Tensor)}
    if torch.cuda.is_initialized():  # where the tensors may be that a dict holds
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    with randomness_restored(devices, numpy=numpy) as saved:
        heard = register_module_forward_pre_hook(before_a_call)
        try:
            yield saved
        finally:
            heard.remove()
            for restore in undo:
                restore()


def with_own_value(
    criterion: Any,
    own: object,
    result: PerSampleLosses,
    elements: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PerSampleLosses:
    """The losses with the value ``own`` of a module, if their mean or sum as it claims."""
    if isinstance(own, Tensor) and own.dim() == 0:
        if _agree(criterion, own, elements):
            return result._replace(value=own)
        if _is_another_draw(criterion, args, kwargs):
            return result  # with the value of these elements
    shown = own.tolist() if isinstance(own, Tensor) else own
    name, reduction = type(criterion).__name__, criterion.reduction
    raise ValueError(
        f"{name} with reduction={reduction!r} returned {shown}, but the {reduction} of its losses "
        f"with reduction='none' is {result.value.item()}: its reduction is one of its own; "
        f"{WAYS_OUT}"
    )


def _agree(criterion: nn.Module, own: Any, elements: Tensor) -> bool:
    elements = elements.detach()
    ours = plain(criterion, elements, 1).value
    size = plain(criterion, elements.abs(), 1).value  # of what may have cancelled in the sum
    close = (own - ours).abs() <= torch.finfo(ours.dtype).eps ** 0.5 * size
    return bool(close | ~ours.isfinite())


def _is_another_draw(criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether they agree from the same random states, or elements never do."""

    def again(call: Callable[..., Any]) -> Any:
        with rehearsal(criterion, (*args, *kwargs.values())):
            return call().detach()

    elements, twin = (again(lambda: unreduced(criterion, args, kwargs)) for _ in range(2))
    own = again(lambda: forward_of(criterion)(*args, **kwargs))
    return not torch.equal(elements, twin) or _agree(criterion, own, elements)


def check_elements(criterion: nn.Module, elements: object) -> None:
    name = type(criterion).__name__
    if not (isinstance(elements, Tensor) and elements.is_floating_point()):
        got = elements.dtype if isinstance(elements, Tensor) else type(elements).__name__
        raise TypeError(f"{name} must return a floating-point tensor of {_SHAPE}, got {got}")
    if elements.dim() == 0:
        hint = (
            "its function must not reduce: give the loss inside it reduction='none'"
            if isinstance(criterion, PerSampleLoss)
            else f"it does not honour reduction='none'; {WAYS_OUT}"
        )
        raise ValueError(f"{name} returned a single number instead of {_SHAPE}: {hint}")


def check_leading_dimension(
    criterion: nn.Module, elements: Tensor, arguments: Iterable[object]
) -> None:
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.dim()]
    predicted = any(t.requires_grad for t in tensors)
    sizes = {len(t) for t in tensors if not (predicted and _may_be_of_classes(t))}
    if sizes and elements.shape[0] not in sizes:
        raise ValueError(
            f"{type(criterion).__name__} returned losses of shape {tuple(elements.shape)}, but its "
            f"arguments have leading dimensions {sorted(sizes)}: return {_SHAPE}; give "
            "per_sample_losses(..., batch_size=B) to fold them; or, where they are right (time or "
            "pairs come first), leave criterion out and call optimizer.backward(losses)"
        )


_checked: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def check_rows_are_samples(
    criterion: nn.Module,
    elements: Tensor,
    batch: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Checks now and then that the losses go along when the samples change places."""
    if not is_due(criterion, _checked):
        return
    # As many calls whatever the numbers are: it may gather from other processes. What may be a
    # number a class goes along, or not.
    calls = []
    for classes_stay in (False, True):
        moved: list[Any] = []
        move = partial(_moved, len(elements), batch, classes_stay, moved)
        other = _called_again(criterion, args, kwargs, move)
        calls += [other] if moved else []  # who holds samples in an object shows nothing
    if batch < 2:
        return
    elements = elements.detach()
    along = elements.roll(len(elements) // batch, 0)
    near = 0.1 * _distance(elements, along)  # far closer than the expectations to each other
    shown = [other for other in calls if other is not None and other.shape == elements.shape]
    if any(_distance(other, along) <= near for other in shown):
        return
    if any(_distance(other, elements) <= near for other in shown):
        raise ValueError(
            f"{type(criterion).__name__} returned losses of shape {tuple(elements.shape)} that "
            "stay when the samples change places: they are not one loss per sample, but reduced "
            f"over the batch (as by the batch=True of a Dice loss); {WAYS_OUT}"
        )


def _may_be_of_classes(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and tensor.is_floating_point() and not tensor.requires_grad


def _moved(rows: int, batch: int, classes_stay: bool, moved: list[Any], value: Any) -> Any:
    """With rows of samples ``moved`` on by one."""
    again = partial(_moved, rows, batch, classes_stay, moved)
    if isinstance(value, Tensor):
        stays = classes_stay and _may_be_of_classes(value)
        if stays or not value.dim() or len(value) not in (rows, batch):
            return value
        moved.append(value)
        return value.detach().roll(len(value) // max(1, batch), 0)
    if isinstance(value, Mapping):
        return type(value)({name: again(v) for name, v in value.items()})  # type: ignore[call-arg]
    if not isinstance(value, list | tuple):
        return value
    batches = any(isinstance(v, Tensor) and v.dim() and len(v) == batch for v in value)
    if len(value) == batch and not batches:
        moved.append(value)
        return [value[-1], *value[:-1]]
    parts = list(map(again, value))
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _called_again(
    criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], move: Callable[[Any], Any]
) -> Tensor | None:
    with rehearsal(criterion, (*args, *kwargs.values())), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.no_grad():
                return unreduced(criterion, move(args), move(kwargs))
        except Exception:  # it says nothing about the samples
            return None


def _distance(left: Tensor, right: Tensor) -> float:
    difference = (left - right).masked_fill(left == right, 0)  # inf - inf is NaN
    return float(difference.abs().max()) if left.numel() else 0.0
