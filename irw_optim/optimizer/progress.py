"""How far a training is, and whether the gradient at hand is one to step on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from irw_optim.weighting.record import StepRecord


class Progress:
    """Steps taken, and the records of the backward passes since the last one.

    Attributes:
        steps: optimizer steps that were taken on a weighted gradient.
        last: the newest record.
        pending: the records of what is in ``p.grad`` now.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.last: StepRecord | None = None
        self.pending: list[StepRecord] = []

    def note(self, record: StepRecord, parameters: Iterable[Tensor]) -> None:
        """Take the record of a backward pass, just before it adds to ``p.grad``."""
        if self.pending and not any(map(_has_gradient, parameters)):
            self.pending.clear()  # zeroed by model.zero_grad(), and perhaps never stepped on
        self.pending.append(record)
        self.last = record

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise unless ``p.grad`` is weighted and finite.

        Gradients of zero pass: there is nothing to weigh, and torch's own functions for distributed
        checkpoints step on them to make an optimizer's state.

        Raises:
            RuntimeError: there is no gradient, or one that no weighted loss made.
            FloatingPointError: a loss or a score is not finite.
        """
        if not self.pending:
            expected = (
                "expected criterion(model(x), y).backward() on the attached criterion with the "
                "model in train mode, optimizer.backward(losses), or step(losses=losses) after "
                "Opacus"
            )
            if all(p.grad is None for p in parameters):
                raise RuntimeError(f"step() found no gradient: {expected}")
            if any(map(_has_gradient, parameters)):
                raise RuntimeError(
                    f"step() found a gradient without weights: {expected}. For a plain step on "
                    "purpose call optimizer.inner.step()"
                )
        for record in self.pending:
            if broken := record.broken_samples:
                shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
                raise FloatingPointError(
                    f"the losses or gradients of {len(broken)} samples are not finite (batch "
                    f"indices {shown}): nothing was updated; look at optimizer.last_step.losses"
                )

    def __getstate__(self) -> dict[str, object]:
        """Copies of parameters have no gradient, so there is no record of one."""
        return {**vars(self), "pending": []}

    def step_taken(self, skipped: bool = False) -> None:
        """Count the step, unless it was no step on a weighted gradient."""
        self.steps += bool(self.pending) and not skipped
        self.pending.clear()


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient._values() if gradient.is_sparse else gradient).any())
