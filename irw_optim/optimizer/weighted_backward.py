"""What turns the losses of a training loop into weighted gradients: all of it but the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from irw_optim.copies import Renewed
from irw_optim.criterion import PerSampleLosses
from irw_optim.distributed.replicas import Replicas, several_processes
from irw_optim.distributed.shards import Shards
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.loss_gradients import NOTHING_TO_SCORE
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.optimizer.accumulation import LogicalBatch
from irw_optim.optimizer.carried_loss import OneProcess, Weigher, carried_loss
from irw_optim.optimizer.options import Options
from irw_optim.optimizer.other_terms import OtherTerms
from irw_optim.optimizer.progress import Progress
from irw_optim.weighting.local_scheme import Averaging, Scheme
from irw_optim.weighting.record import StepRecord


class WeightedBackward(Renewed):
    """Takes the losses of every backward pass, and knows what was decided for them.

    Args:
        inner: whose parameters are updated.
        engine: gives the per-sample gradients.
        options: how.
        chosen: the parameters whose gradients make the scores; None for all.
        replicas: the processes that the model trains in.

    Attributes:
        held: stands in for the options' scheme, where weights are held over many steps.
        progress: the steps taken, and the records since the last one.
    """

    PASSING = ("logical", "other_terms", "_own")

    def __init__(
        self,
        inner: Optimizer,
        engine: Engine,
        options: Options,
        chosen: set[Tensor] | None,
        replicas: Replicas | Shards,
    ) -> None:
        self.inner = inner
        self.engine = engine
        self.options = options
        self.chosen = chosen
        self.replicas = replicas
        self.held: Scheme | None = None
        self.progress = Progress()
        self.begin()

    def begin(self) -> None:
        """No pass waits for others."""
        self.logical = LogicalBatch(self.accumulation_steps)
        self.other_terms = OtherTerms()
        self._own: set[Tensor] = set()

    @property
    def scheme(self) -> Scheme:
        """Decides the weights."""
        return self.options.local if self.held is None else self.held

    @property
    def warmup_steps(self) -> int:
        """This many steps with plain averaging first."""
        return self.options.warmup_steps

    @property
    def accumulation_steps(self) -> int:
        """Backward passes that are weighed together."""
        return self.options.accumulation_steps

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are updated."""
        return [p for group in self.inner.param_groups for p in group["params"]]

    @property
    def scored(self) -> list[Tensor]:
        """The parameters whose gradients make the scores."""
        chosen = self.chosen
        return [p for p in self.parameters if chosen is None or p in chosen]

    def loss(self, batch: PerSampleLosses, *, of_the_model: bool = False) -> Tensor:
        """The criterion's value, carrying the weighted gradient.

        Args:
            batch: per-sample losses with their graph.
            of_the_model: whether losses of something else are a mistake; else they are left alone.
        """
        if not batch.losses.requires_grad:
            return batch.value
        warming_up = self.progress.steps < self.warmup_steps
        scheme = Averaging() if warming_up else self.scheme
        logical = None if warming_up or self.accumulation_steps == 1 else self.logical
        scored = self.scored
        captured = self.engine.capture(batch.losses, self._owns)
        if of_the_model and not captured.leaves:
            captured.close()
            raise RuntimeError(NOTHING_TO_SCORE)
        loss = carried_loss(
            batch,
            self._weigher(scheme, scored),
            captured,
            self.replicas.leaves_of(scored).__contains__,
            logical,
            self.replicas.finish,
        )
        self.replicas.hear(loss)
        if self.other_terms.watching and not several_processes():
            self.other_terms.watch(loss)
        return loss

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients) -> StepRecord:
        """The weights of a batch whose rows are at hand."""
        record = self.scheme.decide(batch, rows)
        self.note(record)
        return record

    def note(self, record: StepRecord) -> None:
        """Keep what was decided for a backward pass."""
        self.progress.note(record, self.parameters)

    def finish(self) -> None:
        """Decide the logical batch with the passes that it has had."""
        if self.logical.members:
            self.replicas.check_reduced()
            self.logical.finish()

    def has_gradient(self) -> bool:
        """Whether there is a gradient at hand, or one to be decided."""
        return bool(self.logical.members) or any(p.grad is not None for p in self.parameters)

    def make_ready(self) -> None:
        """Raise unless the gradient is one that the inner optimizer may use."""
        self.finish()
        if getattr(self.inner, "found_inf", None) is None:  # else its step skips what is not finite
            self.progress.check(self.parameters)

    def evaluated(self, closure: Callable[[], Any]) -> Any:
        """What a closure returns, with its gradient made ready."""
        loss = closure()
        if loss is not None or self.progress.pending:  # a training step may skip its batch
            self.make_ready()
        return loss

    def step_taken(self) -> None:
        """Count the step."""
        self.progress.step_taken(skipped=bool(getattr(self.inner, "found_inf", False)))

    def clear(self) -> None:
        """Forget the backward passes since the last step."""
        self.progress.pending.clear()
        self.logical.clear()

    def release(self) -> None:
        """Remove every hook from the model."""
        self.engine.remove_hooks()
        self.engine = Engine(None)
        self.replicas.release()
        self.logical.clear()

    def _owns(self, leaves: Sequence[Tensor]) -> set[Tensor]:
        """The parameters of the model, and those that are updated."""
        if not self._own.issuperset(leaves):  # or some have become parameters since
            model = self.engine.model
            others = () if model is None else model.parameters()
            self._own = self.replicas.leaves_of([*self.parameters, *others])
        return self._own

    def _weigher(self, scheme: Scheme, scored: Sequence[Tensor]) -> Weigher:
        over = self.replicas.weigher(scheme, self.note, scored, self.accumulation_steps)
        return OneProcess(scheme, self.note) if over is None else over
