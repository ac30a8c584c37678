"""What turns the losses of a training loop into weighted gradients: all of it but the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from irw_optim.backward.accumulation import LogicalBatch
from irw_optim.backward.weighted_loss import OneProcess, Weigher, ordinary_loss, weighted_loss
from irw_optim.copies import Renewed
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.loss_gradients import NOTHING_TO_SCORE
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.optimizer.options import Options
from irw_optim.optimizer.other_terms import OtherTerms
from irw_optim.optimizer.progress import Progress
from irw_optim.processes import is_sharded, several_processes
from irw_optim.weighting.local_scheme import Averaging, Scheme
from irw_optim.weighting.record import StepRecord

_PARAMS = itemgetter("params")

if TYPE_CHECKING:
    from irw_optim.distributed.shards import Processes


class WeightedBackward(Renewed):
    """Takes the losses of every backward pass, and knows what was decided for them.

    Args:
        inner: whose parameters are updated.
        engine: gives the per-sample gradients.
        options: how.
        chosen: the parameters whose gradients make the scores; None for all.

    Attributes:
        held: stands in for the options' scheme, where weights are held over many steps.
        progress: the steps taken, and the records since the last one.
    """

    PASSING = ("logical", "other_terms", "_own")

    def __init__(
        self, inner: Optimizer, engine: Engine, options: Options, chosen: set[Tensor] | None
    ) -> None:
        self.inner = inner
        self.engine = engine
        self.options = options
        self.chosen = chosen
        self.held: Scheme | None = None
        self._processes: Processes | None = None
        self.progress = Progress()
        self.begin()
        if engine.model is not None and (several_processes() or is_sharded(engine.model)):
            self._join_processes()

    def begin(self) -> None:
        """No pass waits for others."""
        self.logical: LogicalBatch | None = None
        self.other_terms = OtherTerms()
        self._own: set[Tensor] = set()

    @property
    def scheme(self) -> Scheme:
        """Decides the weights."""
        return self.options.local if self.held is None else self.held

    @property
    def processes(self) -> Processes | None:
        """Those that the model trains in; None for this one alone."""
        if self._processes is None and several_processes():  # a framework may start them late
            self._join_processes()
        return self._processes

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that are updated."""
        return list(chain.from_iterable(map(_PARAMS, self.inner.param_groups)))

    @property
    def scored(self) -> list[Tensor]:
        """The parameters whose gradients make the scores."""
        parameters, chosen = self.parameters, self.chosen
        return parameters if chosen is None else [p for p in parameters if p in chosen]

    def loss(self, batch: PerSampleLosses, *, of_the_model: bool = False) -> Tensor:
        """The criterion's value, carrying the weighted gradient.

        Args:
            batch: per-sample losses with their graph.
            of_the_model: whether losses of something else are a mistake; else they are left alone.
        """
        losses = batch.losses
        if not losses.requires_grad:
            return batch.value
        processes, options = self.processes, self.options
        warming_up = self.progress.steps < options.warmup_steps
        if warming_up:
            self.progress.report_no_steps(options.warmup_steps)
        scheme = Averaging() if warming_up else self.scheme
        scored = self.scored
        weigher: Weigher = OneProcess(scheme, self.note)
        if processes is not None:
            weigher = processes.weigher(weigher, scored, options)
        one_product = getattr(scheme, "needs_one_product", False)
        captured = self.engine.capture(losses, self._owns, one_product=one_product)
        if not captured.leaves:
            captured.close()
            if of_the_model:
                raise RuntimeError(NOTHING_TO_SCORE)
            return ordinary_loss(batch)
        if not (warming_up or options.accumulation_steps == 1):
            make = self._logical_batch().loss
        elif not scheme.needs_gradients and not captured.others:
            captured.close()
            return weigher.loss(batch)
        else:
            make = weighted_loss if processes is None else processes.weighted_loss
        leaves = scored if processes is None else processes.leaves_of(scored)
        detached = batch._replace(losses=losses.detach())
        loss = make(detached, captured, set(leaves).__contains__, weigher)
        if processes is None and self.other_terms.watching:
            self.other_terms.watch(loss)
        return loss

    def decide(self, batch: PerSampleLosses, rows: PerSampleGradients) -> StepRecord:
        """The weights of a batch whose rows are at hand."""
        record = self.scheme.decide(batch, rows)
        self.note(record)
        return record

    def note(self, record: StepRecord) -> None:
        """Keep what was decided for a backward pass."""
        progress = self.progress
        if progress.pending:
            progress.forget_cleared(self.parameters)
        progress.note(record)

    def finish(self) -> None:
        """Decide the logical batch with the passes that it has had."""
        if self.logical is not None and self.logical.members:
            if self._processes is not None:
                self._processes.check_reduced()
            self.logical.finish()

    def has_gradient(self) -> bool:
        """Whether there is a gradient at hand, or one to be decided."""
        waiting = self.logical is not None and bool(self.logical.members)
        return waiting or any(p.grad is not None for p in self.parameters)

    def make_ready(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Raise unless the gradient of the parameters is one that the inner optimizer may use."""
        if self.logical is not None:
            self.finish()
        if getattr(self.inner, "found_inf", None) is None:  # else its step skips what is not finite
            of = self.parameters if parameters is None else parameters
            self.progress.check(of, self.engine.model)

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
        self.progress.discard()
        if self.logical is not None:
            self.logical.clear()

    def release(self) -> None:
        """Remove every hook from the model."""
        self.engine.remove_hooks()
        self.engine = Engine(None)
        if self._processes is not None:
            self._processes.release()
        if self.logical is not None:
            self.logical.clear()

    def _logical_batch(self) -> LogicalBatch:
        if self.logical is None:
            self.logical = LogicalBatch(self.options.accumulation_steps)
        return self.logical

    def _owns(self, leaves: Sequence[Tensor]) -> set[Tensor]:
        """The parameters of the model, and those that are updated."""
        if not self._own.issuperset(leaves):  # or some have become parameters since
            model = self.engine.model
            known = [*self.parameters, *(() if model is None else model.parameters())]
            self._own = set(known if self.processes is None else self.processes.leaves_of(known))
        return self._own

    def _join_processes(self) -> None:
        """Load what several processes need, which most trainings do not."""
        from irw_optim.distributed.shards import processes_of

        self._processes = processes_of(self.engine.model)
