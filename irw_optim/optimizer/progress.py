"""How far a training is, and whether the gradient at hand is one to step on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from irw_optim.copies import Renewed
from irw_optim.weighting.record import StepRecord


class Progress(Renewed):
    """Steps taken, and the records of the backward passes since the last one.

    Gradients may be taken aside, cleared and written back changed, as gradient surgery does: after
    a weighted backward pass, whatever is in ``p.grad`` counts as made of it.

    Attributes:
        steps: optimizer steps that were taken on a weighted gradient.
        last: the newest record.
        pending: the records of what is in ``p.grad`` now; copies of parameters have no gradient.
        passed: whether a weighted backward pass ran since the last step.
    """

    PASSING = ("pending", "passed", "ready")

    def __init__(self) -> None:
        self.steps = 0
        self.last: StepRecord | None = None
        self.begin()

    def begin(self) -> None:
        """Nothing is in ``p.grad``."""
        self.pending: list[StepRecord] = []
        self.passed = False
        self.ready = False

    def forget_cleared(self, parameters: Iterable[Tensor]) -> None:
        """Gradients may be zeroed by model.zero_grad(), and perhaps were never stepped on."""
        if not any(map(_has_gradient, parameters)):
            self.pending.clear()

    def note(self, record: StepRecord) -> None:
        """Take the record of a backward pass, just before it adds to ``p.grad``."""
        self.pending.append(record)
        self.last = record
        self.passed = True

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise unless ``p.grad`` is weighted and finite.

        Gradients of zero pass: there is nothing to weigh, and torch's own functions for distributed
        checkpoints step on them to make an optimizer's state.

        Raises:
            RuntimeError: there is no gradient, or one that no weighted loss made.
            FloatingPointError: a loss or a score is not finite.
        """
        if not self.pending:
            self._check_unrecorded(parameters)
        for record in self.pending:
            if not record.finite and (broken := record.broken_samples):
                shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
                raise FloatingPointError(
                    f"the losses or gradients of {len(broken)} samples are not finite (batch "
                    f"indices {shown}): nothing was updated; look at optimizer.last_step.losses"
                )

    def _check_unrecorded(self, parameters: Sequence[Tensor]) -> None:
        """`check` for gradients that no backward pass has left here."""
        expected = (
            "expected criterion(model(x), y).backward() on the attached criterion with the model "
            "in train mode, optimizer.backward(losses), or step(losses=losses) after Opacus"
        )
        if all(p.grad is None for p in parameters):
            raise RuntimeError(f"step() found no gradient: {expected}")
        self.ready = any(map(_has_gradient, parameters))
        if not self.ready:
            return
        if not self.passed:
            raise RuntimeError(
                f"step() found a gradient without weights: {expected}. For a plain step on "
                "purpose call optimizer.inner.step()"
            )
        broken = [p for p in parameters if p.grad is not None and not _is_finite(p.grad)]
        if broken:
            raise FloatingPointError(
                f"the gradients written back to {len(broken)} parameters are not finite (the first "
                f"has shape {tuple(broken[0].shape)}): nothing was updated"
            )

    def step_taken(self, skipped: bool = False) -> None:
        """Count the step, unless it was no step on a weighted gradient."""
        self.steps += (bool(self.pending) or self.ready) and not skipped
        self.pending.clear()
        self.passed = self.ready = False


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def _is_finite(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.isfinite().all())
