"""The remedies, from the simplest to the most involved."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from irw_optim.remedies._data import Samples
from irw_optim.remedies._measuring import Judge
from irw_optim.remedies._training import Fitted, Remedy, Training
from irw_optim.schemes import ClassByClassSampler

PLAIN, BALANCED, ORACLE = "plain", "class-balanced", "groups known (oracle)"
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


def oracle_logits(training: Training, samples: Samples, judge: Judge) -> Tensor:
    """Logits (N, C) of plain training's model, its last layer fitted again with groups balanced.

    What there may be to gain.
    Each half of the people is decided by a layer fitted to the other half, whose groups it is told
    (Kirichenko et al. 2023, "Last layer re-training is sufficient").
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    model, recipe = plain(training).model, training.recipe
    seen: list[Tensor] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
        for module in linear[-1:]
    ]
    outputs, labels = samples.read(model, recipe.criterion, recipe.forward)
    for hook in hooks:
        hook.remove()
    features = torch.cat(seen).cpu() if seen else outputs
    if features.ndim != 2 or len(features) != len(labels):
        features = outputs.reshape(len(labels), -1)
    x, y, codes = StandardScaler().fit_transform(features), labels.numpy(), judge.parts["group"]
    weight = (codes >= 0) / np.bincount(codes + 1, minlength=2)[codes + 1].clip(min=1)
    found = torch.full((len(y), training.classes), -100.0)
    halves = StratifiedKFold(2, shuffle=True, random_state=0)
    for one, other in halves.split(x, np.maximum(codes, 0)):
        scaled = weight[one] / weight[one].mean()
        fit = LogisticRegression(max_iter=1000).fit(x[one], y[one], scaled)
        said = np.log(fit.predict_proba(x[other]).clip(min=1e-30))
        found[np.ix_(other, fit.classes_)] = torch.from_numpy(said).float()
    return found
