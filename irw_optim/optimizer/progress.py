"""How far a training is, and whether the gradient at hand is one to step on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from irw_optim.copies import Renewed
from irw_optim.weighting.record import StepRecord

logger = logging.getLogger("irw_optim")


class Progress(Renewed):
    """Steps taken, and the records of the backward passes since the last one.

    Gradients may be taken aside, cleared and written back changed, as gradient surgery does: after
    a weighted backward pass, whatever is in ``p.grad`` counts as made of it.

    Attributes:
        steps: optimizer steps that were taken on a weighted gradient.
        last: the newest record.
        discarded: gradients that were cleared since one was stepped on here.
        pending: the records of what is in ``p.grad`` now; copies of parameters have no gradient.
        passed: whether a weighted backward pass ran since the last step.
    """

    PASSING = ("pending", "passed", "ready")

    def __init__(self) -> None:
        self.steps = 0
        self.last: StepRecord | None = None
        self.discarded = 0
        self.begin()

    def begin(self) -> None:
        """Nothing is in ``p.grad``."""
        self.pending: list[StepRecord] = []
        self.passed = False
        self.ready = False

    def forget_cleared(self, parameters: Iterable[Tensor]) -> None:
        """Gradients may be zeroed by model.zero_grad(), and perhaps were never stepped on."""
        if not any(map(_has_gradient, parameters)):
            self.discard()

    def note(self, record: StepRecord) -> None:
        """Take the record of a backward pass, just before it adds to ``p.grad``."""
        self.pending.append(record)
        self.last = record
        self.passed = True

    def discard(self) -> None:
        """Forget the records of a gradient that was cleared."""
        self.discarded += bool(self.pending)
        self.pending.clear()

    def report_no_steps(self, warmup_steps: int) -> None:
        """Say that a warm-up does not end where somebody else takes the steps."""
        if self.discarded == max(warmup_steps, 10):
            logger.warning(
                "warmup_steps=%d counts the steps of this IRWOptimizer, and it has taken none for "
                "%d gradients: expected its step(), not that of the optimizer inside it",
                warmup_steps,
                self.discarded,
            )

    def check(self, parameters: Sequence[Tensor], model: nn.Module | None) -> None:
        """Raise unless ``p.grad`` is weighted and finite.

        Gradients of zero pass: there is nothing to weigh, and torch's own functions for distributed
        checkpoints step on them to make an optimizer's state.

        Raises:
            RuntimeError: there is no gradient, or one that no weighted loss made.
            FloatingPointError: a loss or a score is not finite.
        """
        self.discarded = 0
        if not self.pending:
            self._check_unrecorded(parameters, model)
        for record in self.pending:
            if not record.finite and (broken := record.broken_samples):
                shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
                raise FloatingPointError(
                    f"the losses or gradients of {len(broken)} samples are not finite (batch "
                    f"indices {shown}): nothing was updated; look at optimizer.last_step.losses"
                )

    def _check_unrecorded(self, parameters: Sequence[Tensor], model: nn.Module | None) -> None:
        """`check` for gradients that no backward pass has left here."""
        if all(p.grad is None for p in parameters):
            raise RuntimeError(f"step() found no gradient: {_expected(model)}")
        self.ready = any(map(_has_gradient, parameters))
        if not self.ready:
            return
        if not self.passed:
            raise RuntimeError(
                f"step() found a gradient without weights: {_expected(model)}. For a plain step "
                "on purpose call optimizer.inner.step()"
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


def _expected(model: nn.Module | None) -> str:
    """What makes a weighted gradient, as far as can be seen what was left out."""
    losses = "optimizer.backward(losses), or step(losses=losses) after Opacus"
    if model is None:
        return (
            "no criterion is attached, so expected IRWOptimizer(..., model=model, "
            f"criterion=criterion) and criterion(model(x), y).backward(); {losses}"
        )
    if not model.training:
        return (
            "the model is in eval mode, where nothing is weighed, so expected train mode, "
            f"model.train(), before criterion(model(x), y).backward(); {losses}"
        )
    return (
        "expected criterion(model(x), y).backward() on the very criterion of IRWOptimizer(..., "
        "model=model, criterion=criterion), called after that line and not given to a newer "
        f"IRWOptimizer since; {losses}"
    )


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def _is_finite(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.isfinite().all())
