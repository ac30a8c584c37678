"""Takes the place of a criterion's ``forward``, in place, and gives it back.

The criterion stays the object that the training loop calls; while the model trains, the scalar it
returns carries the weighted gradient instead of the averaged one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from irw_optim.criterion import PerSampleLosses, per_sample_losses, validate_criterion

Listener = Callable[[PerSampleLosses], Tensor]


def check_unattached(criterion: nn.Module) -> None:
    """Refuse a criterion that is attached to an optimizer that lives."""
    earlier = criterion.__dict__.get("forward")
    if isinstance(earlier, AttachedForward) and earlier.listener() is not None:
        raise ValueError(
            f"criterion={type(criterion).__name__}() is attached to another IRWOptimizer "
            "already: call detach() on that one first, or give each its own criterion"
        )


class AttachedForward:
    """Stands in for ``criterion.forward``.

    Copies and pickles of the criterion get its own ``forward`` back: they belong to nobody.

    Args:
        criterion: attached in place.
        model: asked whether it trains; in eval mode and under no_grad the criterion is untouched.
        listener: method that turns per-sample losses into the scalar to return; held weakly.
    """

    def __init__(self, criterion: nn.Module, model: nn.Module, listener: Listener) -> None:
        validate_criterion(criterion)
        check_unattached(criterion)
        earlier = criterion.__dict__.get("forward")
        if isinstance(earlier, AttachedForward):
            earlier.detach()
        self.criterion = criterion
        self.model = model
        self.listener: WeakMethod[Listener] = WeakMethod(listener)
        self.previous = criterion.__dict__.get("forward")
        criterion.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The listener's scalar while the model trains, else what the criterion returns."""
        listener = self.listener()
        training = torch.is_grad_enabled() and self.model.training
        # per_sample_losses switches the reduction off and comes by here again.
        unreduced = getattr(self.criterion, "reduction", None) == "none"
        if listener is None or not training or unreduced:
            return self.original(*args, **kwargs)
        return listener(per_sample_losses(self.criterion, *args, **kwargs))

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the criterion had before."""
        return self.previous or MethodType(type(self.criterion).forward, self.criterion)

    def detach(self) -> None:
        """Leave the criterion as it was."""
        if self.criterion.__dict__.get("forward") is self:
            del self.criterion.__dict__["forward"]
            if self.previous is not None:
                self.criterion.__dict__["forward"] = self.previous

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(id(self.criterion), self.criterion)
        return MethodType(type(copy).forward, copy)

    def __reduce__(self) -> Any:
        return _own_forward, (self.criterion,)


def _own_forward(criterion: nn.Module) -> Any:
    return MethodType(type(criterion).forward, criterion)
