"""The remedies, from the simplest to the most involved."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from irw_optim.remedies._training import Fitted, Remedy, Training
from irw_optim.schemes import ClassByClassSampler

PLAIN, BALANCED = "plain", "class-balanced"
EARLY = 0.2
"""Share of the steps after which a model says who is worst off."""


def plain(training: Training) -> Fitted:
    """The mean of the losses."""
    return training.once(PLAIN, training.fit)


def moved_threshold(training: Training) -> Fitted:
    """Plain training that decides as if the classes were equally frequent (Menon et al. 2021)."""
    share = training.labels.bincount(minlength=training.classes) / len(training.labels)
    return plain(training)._replace(shift=(-share.log()).masked_fill(share == 0, -torch.inf))


def class_balanced(training: Training, share: float = 1.0) -> Fitted:
    """Every class has the same total weight in the mean of the losses."""
    weight = 1 / training.labels.bincount(minlength=training.classes).clamp(min=1).double()
    weight = weight / weight[training.labels].mean()

    def objective(losses: Tensor, labels: Tensor) -> Tensor:
        return (weight.to(losses)[labels] * losses).mean()

    of_all = weight[training.labels]
    effective = float(of_all.sum().square() / of_all.square().sum() / len(of_all))
    fitted = training.fit(share=share, objective=objective)
    return fitted._replace(effective_share=effective)


def balanced_half(training: Training) -> Fitted:
    """Class-balanced, with half the steps: it stops before the rare class is learnt by heart."""
    return class_balanced(training, share=0.5)


def two_stages(training: Training, by: str = "gradients") -> Fitted:
    """An early class-balanced model says who of each class is worst off; a second learns them."""
    early = training.once("early", lambda: class_balanced(training, EARLY)).model
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
    fitted = training.fit(sampler=sampler)
    return fitted._replace(effective_share=sampler.effective_share, held=True)


def control(training: Training) -> Fitted:
    """The two stages with draws by the losses, for which no gradient is needed."""
    return two_stages(training, by="losses")


def irw(training: Training) -> Fitted:
    """IRW as in the paper, in one training."""
    return training.fit(irw={"alpha": training.alpha})


def irw_centred(training: Training) -> Fitted:
    """IRW with what everybody needs taken off, after plain training for a third of the steps."""
    warm_up = training.recipe.steps // 3
    return training.fit(irw={"alpha": training.alpha, "center": 1.0, "warmup_steps": warm_up})


REMEDIES: dict[str, Remedy] = {
    PLAIN: plain,
    "moved threshold": moved_threshold,
    BALANCED: class_balanced,
    "balanced, half the steps": balanced_half,
    "two stages, by losses": control,
    "two stages, by gradients": two_stages,
    "IRW": irw,
    "IRW, centred": irw_centred,
}
"""By name, in the order in which a simpler one is preferred to one that is no better."""
