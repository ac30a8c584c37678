"""Takes the place of a criterion's ``forward``, in place, and gives it back.

The criterion stays the object that the training loop calls; while the model trains, the scalar it
returns carries the weighted gradient instead of the averaged one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, finalize, ref

import torch
from torch import Tensor, nn

from irw_optim.attachments import Attachment, Removable, Replacement, replace_on
from irw_optim.copies import Renewed
from irw_optim.criterion import PerSampleLosses, per_sample_losses, validate_criterion
from irw_optim.gradients.compiling import uncompiled

if TYPE_CHECKING:
    from irw_optim.optimizer.weighted_backward import WeightedBackward

logger = logging.getLogger("irw_optim")

Listener = Callable[[PerSampleLosses], Tensor]


def check_unattached(criterion: nn.Module, model: nn.Module | None = None) -> None:
    """Refuse a criterion that is attached to an optimizer that lives.

    Args:
        criterion: to be attached.
        model: what it is to be attached for; an older optimizer of the same yields.
    """
    known = isinstance(criterion, nn.Module)  # what else there is is refused elsewhere
    earlier = AttachedCriterion.found_on(criterion) if known else None
    if earlier is None or earlier.listener() is None:
        return
    if model is None or not earlier.yields or earlier.model() is not model:
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
        yields: whether a newer one for the same model gets the criterion, as where a notebook's
            cell runs twice.
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
                logger.info(
                    "%s() goes over to the newer of two optimizers on this model",
                    type(criterion).__name__,
                )
            earlier.remove()
        super().__init__(criterion)

    def put_on(self, module: nn.Module) -> Iterable[Removable]:
        """Attach, and yield what removes it."""
        yield replace_on(module, "forward", _Forward(module, self.model, self.listener))


class _Forward(Replacement):
    """Stands in for ``criterion.forward``."""

    def __init__(
        self,
        criterion: nn.Module,
        model: ref[nn.Module],
        listener: WeakMethod[Listener],
    ) -> None:
        self.criterion = criterion
        self.model = model
        self.listener = listener

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The listener's scalar while the model trains, else what the criterion returns."""
        listener, model = self.listener(), self.model()
        training = torch.is_grad_enabled() and model is not None and model.training
        # per_sample_losses switches the reduction off and comes by here again.
        unreduced = getattr(self.criterion, "reduction", None) == "none"
        if listener is None or not training or unreduced:
            return self.original(*args, **kwargs)
        return listener(per_sample_losses(self.criterion, *args, **kwargs))

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that the criterion had before."""
        return self.previous or MethodType(type(self.criterion).forward, self.criterion)


class Hold(Renewed):
    """What an optimizer has on its model and criterion: all of it goes when this does.

    Losses may live longer than the optimizer, and their graphs know its engine.

    Args:
        weighted: takes the criterion's losses.
        criterion: to attach to the engine's model; None for none.
    """

    PASSING = ("attached",)

    def __init__(self, weighted: WeightedBackward, criterion: nn.Module | None) -> None:
        self.weighted = weighted
        self.given = criterion
        self.begin()

    def begin(self) -> None:
        """Attach the criterion."""
        model = self.weighted.engine.model
        self.attached: AttachedCriterion | None = None
        if self.given is not None and model is not None:
            self.attached = AttachedCriterion(self.given, model, self.weighted.loss, yields=True)
        finalize(self, _release, ref(self.weighted)).atexit = False

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion, while it is attached."""
        attached = self.attached
        return attached.criterion if attached is not None and attached.remove.alive else None

    def let_go(self) -> None:
        """Leave model and criterion as they were."""
        self.weighted.release()
        if self.attached is not None:
            self.attached.remove()
        self.attached = self.given = None

    def __getstate__(self) -> dict[str, Any]:
        """The criterion may have gone over to a newer optimizer."""
        return {**super().__getstate__(), "given": self.criterion}


def _release(weighted: ref[WeightedBackward]) -> None:
    alive = weighted()
    if alive is not None:
        alive.release()
