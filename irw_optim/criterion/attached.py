"""The losses of a criterion: asked of it, or heard of whenever a training loop calls it."""

import logging
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn

from irw_optim.attachments import Attachment, Removable, Replaced, Replacement
from irw_optim.notebook import in_a_notebook
from irw_optim.torch_internals import dual_level, transform, uncompiled

from ._custom import (
    WAYS_OUT,
    check_elements,
    check_leading_dimension,
    check_rows_are_samples,
    value_of_its_own,
    with_own_value,
)
from ._rules import PerSampleLosses, Rule, find_rule, forward_of, plain, unreduced

logger = logging.getLogger("irw_optim")

_CUSTOM = Rule(plain, trusted=False)


def per_sample_losses(
    criterion: nn.Module, *args: Any, batch_size: int | None = None, **kwargs: Any
) -> PerSampleLosses:
    """Computes a criterion's loss for each sample of the batch, differentiably.

    The criterion runs unreduced, without its hooks, and is left as it was. A module that is neither
    torch's nor a :class:`PerSampleLoss` runs once more, with its own reduction, which must give the
    mean or sum of its elements. Dimension 0 is that of samples: elements (B, T) become the mean
    over each sample's T, those with ``ignore_index`` left out.

    Args:
        criterion: A ``torch.nn`` loss with a reduction, a :class:`PerSampleLoss`, or any module
            that returns (B, ...) elements when its attribute ``reduction`` is ``"none"``.
        *args: What the criterion is called with.
        batch_size: B where the call has flattened samples with a further dimension, as in logits
            (B·T, V) against targets (B·T,), row-major. None: each row is a sample.
        **kwargs: What the criterion is called with.

    Returns:
        Losses of shape (B,), and how they make up the criterion's value.

    Raises:
        TypeError: If the criterion has no per-sample losses.
        ValueError: If its ``reduction`` is ``"none"`` or unknown, the elements have no batch
            dimension or are reduced over it, their number is no multiple of `batch_size`, or its
            own value is not their mean or sum.

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
    return _losses_by(validate_criterion(criterion), criterion, args, kwargs, batch_size)


def _losses_by(
    rule: Rule,
    criterion: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int | None = None,
    forward: Callable[..., Any] | None = None,
) -> PerSampleLosses:
    own = value_of_its_own(criterion, args, kwargs) if rule is _CUSTOM else None
    try:
        elements = unreduced(criterion, args, kwargs, forward)
    except Exception as error:
        if rule is not _CUSTOM or isinstance(error, torch.OutOfMemoryError):
            raise
        raise TypeError(
            f"{type(criterion).__name__} with reduction='none' raised {type(error).__name__}: "
            f"{error}; {WAYS_OUT}"
        ) from error
    if not rule.trusted:
        check_elements(criterion, elements)
        if batch_size is None:
            check_leading_dimension(criterion, elements, (*args, *kwargs.values()))
    if not elements.dim() and isinstance(criterion, nn.CTCLoss):
        raise ValueError("CTCLoss without a batch dimension: expected log_probs of shape (T, B, C)")
    if not elements.dim():  # a last batch of one, squeezed
        args = tuple(a[None] if isinstance(a, Tensor) else a for a in args)
        kwargs = {k: v[None] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        return _losses_by(rule, criterion, args, kwargs, batch_size, forward)
    rows = elements.shape[0]
    batch = rows if batch_size is None else batch_size
    if batch != rows and (batch < 1 or rows % batch):
        raise ValueError(
            f"batch_size={batch_size} must divide the {rows} rows of losses of shape "
            f"{tuple(elements.shape)} of {type(criterion).__name__}"
        )
    if not rule.trusted:
        check_rows_are_samples(criterion, elements, batch, args, kwargs)
    result = rule.compute(criterion, elements, batch, *args, **kwargs)
    if rule is not _CUSTOM:
        return result
    return with_own_value(criterion, own, result, elements, args, kwargs)


def validate_criterion(criterion: nn.Module) -> Rule:
    """Its rule; raises for what is impossible before a call."""
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(
            f"criterion={name} is a class: expected an instance, not a class, criterion={name}()"
        )
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion={criterion!r} is no nn.Module: expected one, such as "
            f"torch.nn.CrossEntropyLoss(); or {WAYS_OUT}"
        )
    name = type(criterion).__name__
    rule = find_rule(criterion) or _CUSTOM
    # What torch.compile returns is of a private class; _orig_mod is how its state_dict names it.
    compiled = isinstance(criterion, torch.jit.ScriptModule) or hasattr(criterion, "_orig_mod")
    if rule is _CUSTOM and compiled:
        raise TypeError(
            f"criterion {name} is compiled, which fixes its reduction: use the module it was "
            f"compiled from, here and in the loop, or {WAYS_OUT}"
        )
    reduction = getattr(criterion, "reduction", None)
    if reduction in rule.reductions:
        return rule
    if reduction == "none":
        raise ValueError(
            f"criterion {name} has reduction='none', which leaves the reduction to the training "
            f"loop: construct it with reduction={rule.reductions[0]!r}, or leave criterion out and "
            "call optimizer.backward(losses) with what it returns"
        )
    if reduction is None:
        raise TypeError(f"criterion {name} has no reduction to switch off: {WAYS_OUT}")
    raise ValueError(
        f"criterion {name} has reduction={reduction!r}; known are {', '.join(rule.reductions)}: "
        f"use one of them, or {WAYS_OUT}"
    )


Listener = Callable[[PerSampleLosses], Tensor]


def check_unattached(criterion: nn.Module, model: nn.Module | None = None) -> None:
    """Refuse a criterion that is attached to an optimizer that lives.

    One of the same model yields, and in a notebook any: a cell that runs twice may make both anew.
    """
    earlier = AttachedCriterion.found_on(criterion)
    if earlier is None or earlier.listener() is None:
        return
    may_yield = model is not None and earlier.yields
    if not (may_yield and (earlier.model() is model or in_a_notebook())):
        raise ValueError(
            f"criterion={type(criterion).__name__}() is attached to another IRWOptimizer "
            "already: call detach() on that one first, or give each its own criterion"
        )


class AttachedCriterion(Attachment):
    """Lets a criterion tell its losses for as long as somebody holds this.

    While the model trains, the ``listener``, held weakly, turns them into the scalar to return.
    """

    def __init__(
        self, criterion: nn.Module, model: nn.Module, listener: Listener, *, yields: bool = False
    ) -> None:
        check_unattached(criterion, model if yields else None)
        self.yields = yields
        self.criterion = criterion
        self.model = ref(model)
        self.listener: WeakMethod[Listener] = WeakMethod(listener)
        if (earlier := AttachedCriterion.found_on(criterion)) is not None:
            if earlier.listener() is not None:
                name = type(criterion).__name__
                logger.info("%s() goes over to the newer of two optimizers", name)
            earlier.remove()
        super().__init__(criterion)

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Attach, and yield what removes it."""
        yield Replaced(module, "forward", _Forward(module, self.model, self.listener))


class _Forward(Replacement):
    def __init__(
        self, criterion: nn.Module, model: ref[nn.Module], listener: WeakMethod[Listener]
    ) -> None:
        self.criterion = criterion
        self.model = model
        self.listener = listener
        self.seen: object = None  # what decides on rule and forward

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        listener, model, criterion = self.listener(), self.model(), self.criterion
        training = torch.is_grad_enabled() and model is not None and model.training
        reduction = getattr(criterion, "reduction", None)
        # It may call itself, with reduction "none", while its losses are asked for.
        ordinary = dual_level() >= 0 or transform() is not None  # as the derivatives there are
        if listener is None or not training or reduction == "none" or ordinary:
            return self.original(*args, **kwargs)
        as_seen = type(criterion).forward, vars(criterion).get("forward"), reduction
        if as_seen != self.seen:
            self.rule, self.forward = validate_criterion(criterion), forward_of(criterion)
            self.seen = as_seen
        return listener(_losses_by(self.rule, criterion, args, kwargs, forward=self.forward))

    @property
    def original(self) -> Callable[..., Any]:
        return self.previous or MethodType(type(self.criterion).forward, self.criterion)
