"""The one training loop, `Training.fit`, and the remedies."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from irw_optim import IRWOptimizer
from irw_optim.arguments import real_number
from irw_optim.schemes import ClassByClassSampler
from irw_optim.schemes.batch_losses import Forward

from ._data import ClassLosses, Numbers, Samples

T = TypeVar("T")
PLAIN, BALANCED, ORACLE = "plain", "class-balanced", "groups known (oracle)"


class Fitted(NamedTuple):
    """What a remedy returns; a model alone will do.

    Attributes:
        model: trained.
        effective_share: of the samples, what its weights rested on, in (0, 1].
        shift: (classes,) added to the logits.
        held: whether the weights were made once.
    """

    model: nn.Module
    effective_share: float = 1.0
    shift: Tensor | None = None
    held: bool = False


Remedy: TypeAlias = "Callable[[Training], Fitted | nn.Module]"
"""Gives a trained model, nearly always by `Training.fit`."""


@dataclass(frozen=True)
class Recipe:
    """What all trainings share: arguments of `compare_remedies`, and the ``steps`` of each."""

    make_model: Callable[[], nn.Module]
    criterion: nn.Module
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], Any] | None
    steps: int
    batch_size: int
    forward: Forward | None = None


@dataclass(eq=False)
class Training:
    """What a remedy is given: one seed's training.

    Attributes:
        samples: whose ``loader()`` reads them in order.
        labels: (N,) int64, its classes.
        classes: how many the model decides between.
        seed: of the initialisation and the batches.
        alpha: of IRW.
        spared: seconds of work found done already.
        advance: is told of every step.
    """

    recipe: Recipe
    samples: Samples
    labels: Tensor
    classes: int
    seed: int
    alpha: float
    spared: float = field(default=0.0, init=False)
    advance: Callable[[int], object] = field(default_factory=lambda: lambda steps: None, init=False)
    _made: dict[str, tuple[Any, float]] = field(default_factory=dict, init=False)

    def fit(
        self,
        *,
        share: float = 1.0,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
        sampler: Sampler[int] | None = None,
        irw: Mapping[str, Any] | None = None,
    ) -> Fitted:
        """A model from this seed's initialisation.

        Args:
            share: of the steps, in (0, 1]; the schedule fits into it.
            objective: of losses (B,) and classes (B,); None for the mean.
            sampler: draws the samples; None shuffles them.
            irw: options of `IRWOptimizer`, which then makes the steps.
        """
        if objective and irw:
            raise ValueError("objective and irw: expected one of them")
        recipe, share = self.recipe, real_number("share", share, "(0, 1]")
        steps = max(1, round(share * recipe.steps))
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
                if record and record.worst_off.any():  # past the warm-up
                    rested.append(record.effective_sample_size / len(part.losses))
            else:
                assert part.labels is not None
                value = objective(part.losses, part.labels) if objective else part.losses.mean()
                (value * part.scale).backward()
                inner.step()
            if schedule is not None:
                schedule.step()
            self.advance(1)
        if wrapped is not None:
            wrapped.detach()
        return Fitted(model, sum(rested) / len(rested) if rested else 1.0)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What several begin with, made once; its time counts for each."""
        if name in self._made:
            self.spared += self._made[name][1]
        else:
            started = time.perf_counter()
            self._made[name] = make(), time.perf_counter() - started
        return self._made[name][0]  # type: ignore[no-any-return]

    def _pieces(self, sampler: Sampler[int] | None) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.recipe.batch_size, len(self.samples))
        while True:
            order = torch.randperm(len(self.samples), generator=generator)
            if sampler is not None:
                order = torch.tensor(list(sampler))
            if len(order) < size:
                raise ValueError(f"sampler drew {len(order)} samples: expected a batch of {size}")
            yield from (piece for piece in order.split(size) if len(piece) == size)


def plain(training: Training) -> Fitted:
    return training.once(PLAIN, training.fit)


def moved_threshold(training: Training) -> Fitted:
    """As if the classes were equally frequent (Menon et al. 2021)."""
    share = _sizes(training) / len(training.labels)
    return plain(training)._replace(shift=(-share.log()).masked_fill(share == 0, -torch.inf))


def class_balanced(training: Training, share: float = 1.0) -> Fitted:
    weight = 1 / _sizes(training).clamp(min=1).double()
    weight = weight / weight[training.labels].mean()

    def objective(losses: Tensor, labels: Tensor) -> Tensor:
        return (weight.to(losses)[labels] * losses).mean()

    of_all = weight[training.labels]
    effective = float(of_all.sum().square() / of_all.square().sum() / len(of_all))
    return training.fit(share=share, objective=objective)._replace(effective_share=effective)


def _sizes(training: Training) -> Tensor:
    return training.labels.bincount(minlength=training.classes)


def two_stages(training: Training, by: str = "gradients") -> Fitted:
    """A second model learns who was worst off by class under an early balanced one."""
    early = training.once("early", lambda: class_balanced(training, share=0.2)).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the comparison reports it
        sampler = ClassByClassSampler(
            early,
            training.recipe.criterion,
            training.samples.loader(),
            by=by,
            labels=training.labels,
            generator=torch.Generator().manual_seed(training.seed),
            forward=training.recipe.forward,
            progress=False,
        )
    share = sampler.effective_share
    return training.fit(sampler=sampler)._replace(effective_share=share, held=True)


REMEDIES: dict[str, Remedy] = {
    PLAIN: plain,
    "moved threshold": moved_threshold,
    BALANCED: class_balanced,
    "balanced, half the steps": lambda training: class_balanced(training, share=0.5),
    "two stages, by losses": lambda training: two_stages(training, by="losses"),
    "two stages, by gradients": two_stages,
    "IRW": lambda training: training.fit(irw={"alpha": training.alpha}),
    "IRW, centred": lambda training: training.fit(
        irw={"alpha": training.alpha, "center": 1.0, "warmup_steps": training.recipe.steps // 3}
    ),
}
"""Simpler ones first, which are preferred."""


def oracle_logits(training: Training, samples: Samples, groups: Numbers) -> Tensor:
    """Logits (N, C) of plain training's model, each half by a last layer fitted to the other.

    Balances groups, of which -1 is none ("Last layer re-training", Kirichenko et al. 2023).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    model = plain(training).model
    seen: list[Tensor] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [
        m.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach())) for m in linear[-1:]
    ]
    outputs, labels = samples.read(model)
    for hook in hooks:
        hook.remove()
    features = torch.cat(seen).cpu() if seen else outputs
    if features.ndim != 2 or len(features) != len(labels):
        features = outputs.reshape(len(labels), -1)
    x, y = StandardScaler().fit_transform(features), labels.numpy()
    weight = (groups >= 0) / np.bincount(groups + 1, minlength=2)[groups + 1].clip(min=1)
    found = torch.full((len(y), training.classes), -100.0, dtype=torch.float32)
    halves = StratifiedKFold(2, shuffle=True, random_state=0)
    for one, other in halves.split(x, np.maximum(groups, 0)):
        scaled = weight[one] / weight[one].mean()
        fit = LogisticRegression(max_iter=1000).fit(x[one], y[one], scaled)
        said = np.log(fit.predict_proba(x[other]).clip(min=1e-30))
        found[np.ix_(other, fit.classes_)] = torch.from_numpy(said).float()
    return found
