"""What an optimizer has on its model and its criterion, and how it lets go of both."""

from __future__ import annotations

from typing import Any
from weakref import finalize, ref

from torch import nn

from irw_optim.copies import Renewed
from irw_optim.criterion.attached import AttachedCriterion
from irw_optim.optimizer.weighted_backward import WeightedBackward


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
