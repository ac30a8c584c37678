"""The one training loop; what differs between the remedies is what they ask of `Training.fit`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from irw_optim import IRWOptimizer
from irw_optim.remedies._data import ClassLosses, Samples
from irw_optim.schemes.batch_losses import Forward

Objective = Callable[[Tensor, Tensor], Tensor]
"""From the losses of a batch, (B,), and its classes, (B,), to the number that is minimised."""

T = TypeVar("T")


class Fitted(NamedTuple):
    """What a remedy returns; a model alone will do.

    Attributes:
        model: trained.
        effective_share: the share of the samples that its weights rested on, in (0, 1].
        shift: (classes,) added to the logits of a model with one output a class; None for nothing.
        held: whether the weights were made once and held, so that few samples may be learnt by
            heart.
    """

    model: nn.Module
    effective_share: float = 1.0
    shift: Tensor | None = None
    held: bool = False


class Remedy(Protocol):
    """Trains one model, or decides otherwise with one."""

    def __call__(self, training: Training, /) -> Fitted | nn.Module:
        """A trained model; nearly always by `Training.fit`."""


@dataclass(frozen=True)
class Recipe:
    """What all trainings share.

    Attributes:
        make_model: gives an untrained model.
        criterion: of the training.
        optimizer: makes an optimizer of the parameters.
        scheduler: makes a learning rate's schedule of optimizer and number of steps; None: none.
        steps: of a training.
        batch_size: of a step.
        forward: gives the criterion's arguments; None for batches (inputs, target).
    """

    make_model: Callable[[], nn.Module]
    criterion: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], Any] | None
    steps: int
    batch_size: int
    forward: Forward | None = None


class Training:
    """What a remedy is given: one seed's training, with all that the remedies share.

    Attributes:
        recipe: model, criterion, optimizer, steps.
        samples: the training data; ``samples.loader()`` reads it in order.
        labels: (N,) int64, its classes.
        classes: how many outputs the model decides between.
        seed: of the initialisation and the batches, which all remedies share.
        alpha: the share of the samples that IRW takes for the worst-off.
        spared: seconds of work that a remedy found done already.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Samples,
        labels: Tensor,
        classes: int,
        seed: int,
        alpha: float,
        advance: Callable[[int], None],
    ) -> None:
        self.recipe, self.samples, self.labels = recipe, samples, labels
        self.classes, self.seed, self.alpha = classes, seed, alpha
        self.spared = 0.0
        self._advance = advance
        self._made: dict[str, tuple[Any, float]] = {}

    def fit(
        self,
        *,
        share: float = 1.0,
        objective: Objective | None = None,
        sampler: Sampler[int] | None = None,
        irw: Mapping[str, Any] | None = None,
    ) -> Fitted:
        """A model after a share of the steps, from this seed's initialisation.

        Args:
            share: of the steps, in (0, 1]; the schedule fits into them.
            objective: of a batch; None for the mean.
            sampler: draws the samples; None shuffles them.
            irw: options of `IRWOptimizer`, which then makes the steps.
        """
        recipe, steps = self.recipe, max(1, round(share * self.recipe.steps))
        torch.manual_seed(self.seed)
        model = recipe.make_model()
        inner = recipe.optimizer(model.parameters())
        wrapped = None if irw is None else IRWOptimizer(inner, model=model, **irw)
        schedule = recipe.scheduler and recipe.scheduler(wrapped or inner, steps)
        losses_of = ClassLosses(model, recipe.criterion, recipe.forward)
        rested: list[float] = []
        for batch in self.samples.batches(islice(self._pieces(sampler), steps)):
            inner.zero_grad()
            part = losses_of(batch)
            if wrapped is not None:
                wrapped.backward(part.losses * part.scale, labels=part.labels)
                wrapped.step()
                record = wrapped.last_step
                if record is not None and bool(record.worst_off.any()):  # past the warm-up
                    rested.append(record.effective_sample_size / len(part.losses))
            else:
                assert part.labels is not None
                value = objective(part.losses, part.labels) if objective else part.losses.mean()
                (value * part.scale).backward()
                inner.step()
            if schedule is not None:
                schedule.step()
            self._advance(1)
        if wrapped is not None:
            wrapped.detach()
        return Fitted(model, sum(rested) / len(rested) if rested else 1.0)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What several remedies begin with, made for the first; its time counts for each."""
        if name not in self._made:
            started = time.perf_counter()
            self._made[name] = make(), time.perf_counter() - started
        else:
            self.spared += self._made[name][1]
        made: T = self._made[name][0]
        return made

    def _pieces(self, sampler: Sampler[int] | None) -> Iterator[Tensor]:
        """The indices of each batch, without end; all of the same size."""
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.recipe.batch_size, len(self.samples))
        while True:
            order = (
                torch.randperm(len(self.samples), generator=generator)
                if sampler is None
                else torch.tensor(list(sampler))
            )
            yield from (piece for piece in order.split(size) if len(piece) == size)
