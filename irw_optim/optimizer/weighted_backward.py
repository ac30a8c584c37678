"""What turns losses into weighted gradients: all of it but the step."""

import logging
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from irw_optim.attachments import Renewed
from irw_optim.backward.accumulation import LogicalBatch
from irw_optim.backward.weighted_loss import OneProcess, Weigher, ordinary_loss, weighted_loss
from irw_optim.criterion import PerSampleLosses
from irw_optim.criterion.attached import AttachedCriterion
from irw_optim.gradients.engine import Engine
from irw_optim.gradients.loss_gradients import NOTHING_TO_SCORE, LossGradients
from irw_optim.gradients.protocol import MaterializedGradients
from irw_optim.torch_internals import has_group, is_sharded, several_processes
from irw_optim.weighting import Averaging, Scheme, StepRecord
from irw_optim.weighting.weights import check_labels, check_losses

from .at_hand import OtherTerms, check_rows, check_unrecorded, has_gradient, warn_of_mixing
from .options import Options

if TYPE_CHECKING:
    from irw_optim.distributed.shards import Processes

logger = logging.getLogger("irw_optim")

_PARAMS = itemgetter("params")
ALONE = 16  # so many batches of one sample are worth a word


class WeightedBackward(Renewed):
    """Knows what was decided for the losses of every backward pass."""

    PASSING = ("attached", "pending", "passed", "ready", "logical", "other_terms", "_own")

    def __init__(
        self, inner: Optimizer, engine: Engine, options: Options, chosen: set[Tensor] | None
    ) -> None:
        self.inner, self.engine, self.options = inner, engine, options
        self.chosen = chosen  # the parameters whose gradients make the scores; None for all
        self.held: Scheme | None = None  # in place of the options', where weights last many steps
        self.steps = 0  # of the optimizer, on a weighted gradient
        self.last: StepRecord | None = None
        self.discarded = 0  # gradients that were cleared since one was stepped on here
        self.alone = 0  # batches of one sample, in a row
        self._processes: Processes | None = None
        self._given: nn.Module | None = None
        self.begin()
        if engine.model is not None and (several_processes() or is_sharded(engine.model)):
            self._join_processes()

    def begin(self) -> None:
        """Nothing is in ``p.grad``, and no pass waits for others."""
        self.pending: list[StepRecord] = []  # of what is in ``p.grad``
        self.passed = self.ready = False  # a backward pass has; with a gradient but no record
        self.logical = LogicalBatch(self.options.accumulation_steps)
        self.other_terms = OtherTerms()
        self._own: set[Tensor] = set()
        self.attach(self._given)

    def attach(self, criterion: nn.Module | None) -> None:
        """Take the losses of a criterion, until a newer optimizer does."""
        model, self._given = self.engine.model, criterion
        self.attached: AttachedCriterion | None = None
        if criterion is not None and model is not None:
            self.attached = AttachedCriterion(criterion, model, self.loss, yields=True)

    @property
    def criterion(self) -> nn.Module | None:
        """While it is attached: it may have gone over to a newer optimizer."""
        attached = self.attached
        return attached.criterion if attached is not None and attached.remove.alive else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given": self.criterion}

    @property
    def scheme(self) -> Scheme:
        """Decides the weights."""
        return self.options.local if self.held is None else self.held

    @property
    def processes(self) -> "Processes | None":
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
        """The criterion's value, carrying the weighted gradient of losses with their graph.

        Losses of something else are left alone, unless they have to be ``of_the_model``.
        """
        losses = batch.losses
        if not losses.requires_grad:
            return batch.value
        processes, options = self.processes if has_group() else self._processes, self.options
        warming_up = self.steps < options.warmup_steps
        if warming_up and self.discarded == max(options.warmup_steps, 10):
            logger.warning(
                "warmup_steps=%d counts the steps of this IRWOptimizer, and it has taken none for "
                "%d gradients: expected its step(), not that of the optimizer inside it",
                *(options.warmup_steps, self.discarded),
            )
        scheme: Scheme = options.local if self.held is None else self.held
        scheme = Averaging() if warming_up else scheme
        scored = self.scored
        weigher: Weigher = OneProcess(scheme, self.note)
        if processes is not None:
            how = options.worst_off, options.accumulation_steps, options.described
            weigher = processes.weigher(weigher, scored, *how)
        one_product = getattr(scheme, "needs_one_product", False)
        captured = LossGradients(self.engine, losses, self._owns, one_product=one_product)
        if not captured.leaves:
            captured.close()
            if of_the_model:
                raise RuntimeError(NOTHING_TO_SCORE)
            return ordinary_loss(batch)
        if not (warming_up or options.accumulation_steps == 1):
            make = self.logical.loss
        elif not scheme.needs_gradients and not captured.others:
            captured.close()
            return weigher.loss(batch)
        else:
            make = weighted_loss if processes is None else processes.weighted_loss
        leaves = scored if processes is None else processes.leaves_of(scored)
        detached = PerSampleLosses(losses.detach(), *batch[1:])
        loss = make(detached, captured, set(leaves).__contains__, weigher)
        if processes is not None:
            processes.prepare(loss)
        elif self.other_terms.watching:
            self.other_terms.watch(loss)
        return loss

    def weigh_rows(self, losses: Tensor, labels: Tensor | None) -> None:
        """The third way in: the weighted sum of ``p.grad_sample``."""
        check_losses(losses)
        if labels is not None:
            check_labels(labels, len(losses))
        rows = MaterializedGradients.from_grad_sample(self.parameters)
        if rows.batch_size != len(losses):
            raise ValueError(
                f"losses has {len(losses)} samples but p.grad_sample has {rows.batch_size}: "
                "expected the losses of the batch that was backpropagated last"
            )
        if not several_processes():  # whose gradients are averaged, and the rows not
            check_rows(rows.rows)
        batch = PerSampleLosses(losses.detach(), losses.detach().mean(), 1.0, labels)
        scored = set(self.scored)
        chosen = MaterializedGradients({p: g for p, g in rows.rows.items() if p in scored})
        record = self.scheme.decide(batch, chosen)
        self.note(record)
        for parameter, gradient in rows.combine(record.weights).items():
            parameter.grad = gradient.to(parameter.dtype)
        warn_of_mixing(losses, self.engine)

    def note(self, record: StepRecord) -> None:
        """Take the record of a pass, just before it adds to ``p.grad``."""
        # Gradients may have been zeroed by model.zero_grad().
        if self.pending and not any(map(has_gradient, self.parameters)):
            self.pending.clear()
            self.discarded += 1
        if self.alone < ALONE:
            self.alone = self.alone + 1 if record.losses.shape[0] == 1 else 0
            if self.alone == ALONE and not getattr(self.held, "resampled", self.held is not None):
                logger.warning(
                    "the last %d batches had one sample each, whose weight is 1: nothing is "
                    "weighed. Expected several samples in a call of the criterion, or several "
                    "backward passes together, IRWOptimizer(..., accumulation_steps=8)",
                    ALONE,
                )
        self.pending.append(record)
        self.last = record
        self.passed = True

    def finish(self) -> None:
        """Decide the logical batch with the passes that it has had."""
        if self.logical.members:
            if self._processes is not None:
                self._processes.check_reduced()
            self.logical.finish()

    def has_gradient(self) -> bool:
        """Whether there is a gradient at hand, or one to be decided."""
        return bool(self.logical.members) or any(p.grad is not None for p in self.parameters)

    def make_ready(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Raise unless the gradient was weighted, and is finite."""
        if self.logical.members:
            self.finish()
        if getattr(self.inner, "found_inf", None) is not None:
            return  # its step skips what is not finite
        self.discarded = 0
        if not self.pending:
            of = self.parameters if parameters is None else parameters
            self.ready = check_unrecorded(of, self.engine.model, self.passed)
        for record in self.pending:
            if not record.finite:
                record.check_finite()

    def step_taken(self) -> None:
        """Count the step, unless it was skipped or on no weighted gradient."""
        skipped = bool(getattr(self.inner, "found_inf", False))
        self.steps += (bool(self.pending) or self.ready) and not skipped
        self.pending.clear()
        self.passed = self.ready = False

    def clear(self) -> None:
        """Forget the backward passes since the last step."""
        self.discarded += bool(self.pending)
        self.pending.clear()
        if self.logical.members:
            self.logical.clear()

    def release(self) -> None:
        """Leave model and criterion as they were."""
        self.engine.remove_hooks()
        self.engine = Engine(None)
        if self._processes is not None:
            self._processes.release()
        self.logical.clear()
        if self.attached is not None:
            self.attached.remove()
        self.attached = self._given = None

    def _owns(self, leaves: Sequence[Tensor]) -> set[Tensor] | None:
        """The model's and the updated parameters; None where all leaves are."""
        if not self._own.issuperset(leaves):  # or some have become parameters since
            model = self.engine.model
            known = [*self.parameters, *(() if model is None else model.parameters())]
            self._own = set(known if self.processes is None else self.processes.leaves_of(known))
            if not self._own.issuperset(leaves):
                return self._own
        return None

    def _join_processes(self) -> None:
        from irw_optim.distributed.shards import processes_of

        self._processes = processes_of(self.engine.model)
