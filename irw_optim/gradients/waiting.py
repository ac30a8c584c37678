"""Losses whose backward pass is still to come."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from irw_optim.gradients.loss_gradients import LossGradients


class Waiting:
    """Losses whose backward pass is still to come, whichever engine's: they may share a graph.

    Trainings may run in several threads, and a backward pass in one of autograd's.
    """

    def __init__(self) -> None:
        self.batches: WeakSet[LossGradients] = WeakSet()
        self.lock = Lock()

    def join(self, batch: LossGradients) -> None:
        nodes = batch.graph.nodes.keys()
        with self.lock:
            for other in self.batches:
                if not nodes.isdisjoint(other.graph.nodes.keys()):
                    other.sharing.add(batch)
                    batch.sharing.add(other)
            self.batches.add(batch)

    def leave(self, batch: LossGradients) -> None:
        with self.lock:
            self.batches.discard(batch)


WAITING = Waiting()
