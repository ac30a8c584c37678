"""The two questions asked of a criterion: can it be used, and what are its losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from irw_optim.criterion._calls import unreduced, value_of_its_own
from irw_optim.criterion._custom import (
    check_elements,
    check_leading_dimension,
    check_rows_are_samples,
    with_own_value,
)
from irw_optim.criterion._rules import PerSampleLosses, Rule, find_rule, plain

_CUSTOM = Rule(plain, trusted=False)
_WAYS_OUT = (
    "wrap a function that returns losses of shape (B,) as PerSampleLoss(fn), or leave criterion "
    "out and call optimizer.backward(losses) in place of loss.backward()"
)


def per_sample_losses(
    criterion: nn.Module, *args: Any, batch_size: int | None = None, **kwargs: Any
) -> PerSampleLosses:
    """Computes a criterion's loss for each sample of the batch, differentiably.

    The criterion runs unreduced and without its hooks, and is left as it was. A module that is not
    torch's runs once more, with its own reduction: the value is always its own, and a reduction
    other than the mean or sum of its elements is refused at the batch that shows it (counters,
    buffers and random states see one call). A :class:`PerSampleLoss` spares that. Samples are
    dimension 0 of the elements (of the losses, for CTC, of shape (B,)): a loss of shape (B, T)
    becomes the mean over each sample's own T elements, those with ``ignore_index`` left out.

    Args:
        criterion: A ``torch.nn`` loss with a reduction, a :class:`PerSampleLoss`, or any module
            that returns (B, ...) elements when its attribute ``reduction`` is ``"none"``.
        *args: What the criterion is called with.
        batch_size: Number of samples B where the call has flattened them with a further
            dimension, as in logits (B·T, V) against targets (B·T,): the elements' dimension 0 is
            then folded row-major into (B, T). None: each row is a sample.
        **kwargs: What the criterion is called with.

    Returns:
        Losses of shape (B,), and how they make up the criterion's value.

    Raises:
        TypeError: If per-sample losses cannot be had from such a criterion.
        ValueError: If its ``reduction`` is ``"none"`` or unknown, the elements have no batch
            dimension or are reduced over the batch, their number of rows is no multiple of
            `batch_size`, or the criterion's own value is not their mean or sum.

    Example:
        >>> import torch
        >>> from irw_optim.criterion import per_sample_losses
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> batch = per_sample_losses(torch.nn.CrossEntropyLoss(), logits, torch.tensor([0, 1]))
        >>> batch.losses
        tensor([0.1269, 0.6931], grad_fn=<NllLossBackward0>)
        >>> batch.value, batch.scale
        (tensor(0.4100), 1.0)
    """
    rule = validate_criterion(criterion)
    own = value_of_its_own(criterion, args, kwargs) if rule is _CUSTOM else None
    elements = unreduced(criterion, args, kwargs)
    if not rule.trusted:
        check_elements(criterion, elements)
        if batch_size is None:
            check_leading_dimension(criterion, elements, (*args, *kwargs.values()))
    if batch_size is None and elements.dim():
        batch = elements.shape[0]
    else:
        batch = _number_of_samples(criterion, elements, batch_size)
    if not rule.trusted:
        check_rows_are_samples(criterion, elements, batch, args, kwargs)
    result = rule.compute(criterion, elements, batch, *args, **kwargs)
    if rule is not _CUSTOM:
        return result
    return with_own_value(criterion, own, result, elements, args, kwargs)


def validate_criterion(criterion: nn.Module) -> Rule:
    """The rule of a criterion; raises for what can be seen to be impossible before a call.

    Args:
        criterion: for :func:`per_sample_losses`.

    Raises:
        TypeError: no ``nn.Module``, compiled, or without a reduction.
        ValueError: its reduction is ``"none"`` or unknown.

    >>> _ = validate_criterion(nn.MSELoss())
    >>> validate_criterion(nn.MSELoss(reduction="none"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: criterion MSELoss has reduction='none', which leaves ...
    """
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(
            f"criterion={name} is a class: expected an instance, not a class, criterion={name}()"
        )
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion={criterion!r} is no nn.Module, so its call cannot be followed: expected "
            f"one, such as torch.nn.CrossEntropyLoss(); or {_WAYS_OUT}"
        )
    rule = find_rule(criterion) or _CUSTOM
    if rule is _CUSTOM and _is_compiled(criterion):
        raise TypeError(
            f"criterion {type(criterion).__name__} is compiled, which fixes its reduction: use the "
            f"module it was compiled from, here and in the training loop, or {_WAYS_OUT}"
        )
    reduction = getattr(criterion, "reduction", None)
    if reduction in rule.reductions:
        return rule
    name = type(criterion).__name__
    if reduction == "none":
        raise ValueError(
            f"criterion {name} has reduction='none', which leaves the reduction to the training "
            f"loop: construct it with reduction={rule.reductions[0]!r}, or leave criterion out and "
            "call optimizer.backward(losses) with the losses it returns"
        )
    if reduction is None:
        raise TypeError(f"criterion {name} has no reduction to switch off: {_WAYS_OUT}")
    raise ValueError(
        f"criterion {name} has reduction={reduction!r}; known are {', '.join(rule.reductions)}: "
        f"use one of them, or {_WAYS_OUT}"
    )


def _is_compiled(criterion: nn.Module) -> bool:
    # What torch.compile returns is of a private class; _orig_mod is how its state_dict names it.
    return isinstance(criterion, torch.jit.ScriptModule) or hasattr(criterion, "_orig_mod")


def _number_of_samples(criterion: nn.Module, elements: Tensor, batch_size: int | None) -> int:
    if elements.dim() == 0:
        raise ValueError(
            f"{type(criterion).__name__} was called on a single sample without a batch dimension: "
            "add one, as in criterion(output.unsqueeze(0), target.unsqueeze(0))"
        )
    rows = elements.shape[0]
    if batch_size is None or batch_size == rows:
        return rows
    if batch_size < 1 or rows % batch_size:
        raise ValueError(
            f"batch_size={batch_size} must divide the {rows} rows of losses of shape "
            f"{tuple(elements.shape)} that {type(criterion).__name__} computed"
        )
    return batch_size
