"""Takes the place of a criterion's ``forward``, in place, and gives it back.

The criterion stays the object that the training loop calls; while the model trains, the scalar it
returns carries the weighted gradient instead of the averaged one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any
from weakref import WeakMethod, ref

import torch
from torch import Tensor, nn

from irw_optim.attachments import Attachment, Removable, Replaced, Replacement
from irw_optim.criterion._dispatch import per_sample_losses, validate_criterion
from irw_optim.criterion._rules import PerSampleLosses
from irw_optim.notebook import in_a_notebook
from irw_optim.torch_internals import uncompiled

logger = logging.getLogger("irw_optim")

Listener = Callable[[PerSampleLosses], Tensor]


def check_unattached(criterion: nn.Module, model: nn.Module | None = None) -> None:
    """Refuse a criterion that is attached to an optimizer that lives.

    An older optimizer of the same model yields, and in a notebook one of any model: a cell that
    runs twice may make both anew. The older one raises if it steps.
    """
    known = isinstance(criterion, nn.Module)  # what else there is is refused elsewhere
    earlier = AttachedCriterion.found_on(criterion) if known else None
    if earlier is None or earlier.listener() is None:
        return
    may_yield = model is not None and earlier.yields
    if not (may_yield and (earlier.model() is model or in_a_notebook())):
        raise ValueError(
            f"criterion={type(criterion).__name__}() is attached to another IRWOptimizer "
            "already: call detach() on that one first, or give each its own criterion"
        )


class AttachedCriterion(Attachment):
    """Lets a criterion tell its per-sample losses, for as long as somebody holds this.

    Args:
        criterion: attached in place.
        model: asked whether it trains; in eval mode and under no_grad the criterion is untouched.
        listener: method that turns per-sample losses into the scalar to return; held weakly.
        yields: whether a newer one may get the criterion, as where a notebook's cell runs twice.
    """

    def __init__(
        self, criterion: nn.Module, model: nn.Module, listener: Listener, *, yields: bool = False
    ) -> None:
        validate_criterion(criterion)
        check_unattached(criterion, model if yields else None)
        self.yields = yields
        self.criterion = criterion
        self.model = ref(model)
        self.listener: WeakMethod[Listener] = WeakMethod(listener)
        earlier = AttachedCriterion.found_on(criterion)
        if earlier is not None:
            if earlier.listener() is not None:
                name = type(criterion).__name__
                logger.info("%s() goes over to the newer of two optimizers", name)
            earlier.remove()
        super().__init__(criterion)

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Attach, and yield what removes it."""
        yield Replaced(module, "forward", _Forward(module, self.model, self.listener))


class _Forward(Replacement):
    """Stands in for ``criterion.forward``."""

    def __init__(
        self, criterion: nn.Module, model: ref[nn.Module], listener: WeakMethod[Listener]
    ) -> None:
        self.criterion = criterion
        self.model = model
        self.listener = listener

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The listener's scalar while the model trains, else what the criterion returns."""
        listener, model, criterion = self.listener(), self.model(), self.criterion
        training = torch.is_grad_enabled() and model is not None and model.training
        # A criterion may call itself while its losses are asked for, without a reduction.
        unreduced = getattr(criterion, "reduction", None) == "none"
        if listener is None or not training or unreduced:
            return self.original(*args, **kwargs)
        return listener(per_sample_losses(criterion, *args, **kwargs))

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the criterion had before."""
        return self.previous or MethodType(type(self.criterion).forward, self.criterion)
