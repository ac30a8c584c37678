"""Weights of a data set by a model in no training."""

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from irw_optim.arguments import one_of, true_or_false
from irw_optim.backward.weighted_loss import some_of
from irw_optim.criterion import PerSampleLosses
from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.metrics._groups import ArrayLike, Group, as_classes
from irw_optim.optimizer.irw_optimizer import ScoreParameters
from irw_optim.optimizer.options import Options
from irw_optim.weighting import Alignment, LocalScheme, StepRecord, present_of
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.weights import ScoreRule

from .batch_losses import Forward
from .dataset_gradients import DatasetGradients
from .reading import DatasetReader
from .resampling import ResamplingSampler
from .weighing import weigh_by

FEW = 1 / 3
"""Weights on a lesser share are learnt by heart."""


@dataclass(frozen=True)
class _ByLoss:
    """Scores in proportion to the loss."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        return losses.detach()


RULES: dict[str, ScoreRule] = {"gradients": Alignment(), "losses": _ByLoss()}


def global_weights(
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader[Any],
    alpha: float,
    outliers: OutlierFilter | None = None,
    score_parameters: ScoreParameters = None,
    progress: bool = True,
    *,
    center: float = 0.0,
    class_balance: bool = False,
    within_classes: bool = False,
    labels: ArrayLike | None = None,
    mix: float = 0.0,
    batch_size: int | None = None,
    outlier_block: int = 256,
    forward: Forward | None = None,
    engine: str = "auto",
) -> Tensor:
    """IRW weights of all N samples of a data set (arXiv 2411.03068, the global scheme).

    S is the worst-off alpha-fraction of the data set, and w_i is proportional to
    max(0, <g_i, g_S>). The samples are read two or three times, nearly in the data set's order,
    with the model in eval mode; neither the loader's sampler nor the batch size makes a difference.
    A loss that depends on who else is in the batch is logged. The processes of a
    DistributedDataParallel, with the same data set each, share the reading; given the module
    inside, each makes all.

    Args:
        model: gives the gradients; its parameters decide the device.
        criterion: as of `IRWOptimizer`.
        loader: over a map-style data set without random augmentation, of ``(inputs, target)`` or
            what ``forward`` understands.
        alpha: lower bound on the share of the smallest group, in (0, 1].
        outliers: filter in gradient space, for example `DBSCANFilter` (IRWO), in blocks.
        score_parameters: as of `IRWOptimizer`.
        progress: show a bar, by tqdm.
        center: beta >= 0; above 0, pass 2 covers the whole data set.
        class_balance: give every class of the data set the same total weight.
        within_classes: S, scores and weights in each class by itself, of the same total weight.
            ``outliers`` still compares all classes.
        labels: (N,) classes for ``within_classes``, of any kind; None takes the criterion's target.
        mix: lambda in [0, 1]; w <- (1 - lambda) w + lambda / N, or of each class alike.
        batch_size: samples at once; None takes the loader's. Twice as many where little is kept.
        outlier_block: samples that ``outliers`` compares with each other, at most.
        forward: ``forward(model, batch)`` gives the criterion's arguments.
        engine: as of `IRWOptimizer`.

    Returns:
        (N,) weights that sum to 1, on the model's device, in the order of the data set.

    Raises:
        TypeError, ValueError: an argument that does not fit; an iterable data set; data sets or
            options that differ between processes.
        FloatingPointError: losses or scores that are not finite, with the samples' indices.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.randn(40, 2), torch.randint(0, 2, (40,)))
    >>> loader = DataLoader(data, batch_size=8, shuffle=True)
    >>> weights = global_weights(nn.Linear(2, 2), nn.CrossEntropyLoss(), loader, alpha=0.2)
    >>> weights.shape, round(float(weights.sum()), 4)
    (torch.Size([40]), 1.0)
    """
    within_classes = true_or_false("within_classes", within_classes)
    if labels is not None and not within_classes:
        raise ValueError("labels are given and within_classes=False: give within_classes=True")
    scheme = Options(alpha, outliers, center, class_balance, mix).local
    reader = DatasetReader(loader, batch_size)
    if within_classes:
        codes = class_codes(labels, reader.size)
        scheme = WithinClasses(scheme.alpha, scheme.rule, outliers, mix=scheme.mix, given=codes)
    return weigh_by(
        scheme, model, criterion, reader, score_parameters, progress, outlier_block, forward, engine
    ).weights


@dataclass(frozen=True)
class WithinClasses(LocalScheme):
    """Weighs the samples of each class against each other; of C classes each has the weight 1 / C.

    Between classes the sign of <g_i, g_S> is little but the label. The classes are ``given``, (N,)
    int64, or the criterion's target.
    """

    given: Tensor | None = None

    def decide(
        self, batch: PerSampleLosses, rows: PerSampleGradients, removed: Tensor | None = None
    ) -> StepRecord:
        """As of `LocalScheme`."""
        assert isinstance(rows, DatasetGradients)
        labels = batch.labels if self.given is None else self.given.to(batch.losses.device)
        if labels is None:
            raise ValueError(
                "weights within classes need one class a sample, and the criterion's target shows "
                "none: give labels=, one class for each"
            )
        batch = batch._replace(labels=labels)
        present = present_of(batch.counts)
        if batch.counts is not None and not batch.counts.any():
            raise ValueError("all targets are ignored: expected a sample with a target")
        inside = torch.ones_like(labels, dtype=torch.bool) if present is None else present
        members = [(labels == label) & inside for label in labels[inside].unique()]
        records = []
        for own in members:
            # Nobody of a class of which all would be.
            out = None if removed is None else removed[own] & ~removed[own].all()
            records.append(super().decide(some_of(batch, own), rows.of(own), out))
        places = torch.cat([own.nonzero().squeeze(1) for own in members])
        found: dict[str, Any] = {}
        for name in ("worst_off", "outliers", "scores", "weights"):
            parts = torch.cat([getattr(record, name) for record in records])
            found[name] = parts.new_zeros(len(labels)).index_copy(0, places, parts)
        found["weights"] /= len(members)
        found["fallback"] = torch.stack([record.fallback for record in records]).all()
        return StepRecord(**found, losses=batch.losses.detach(), labels=labels)


def class_codes(labels: ArrayLike | None, size: int) -> Tensor | None:
    """Labels of any kind as numbers from 0, (N,) int64."""
    if labels is None:
        return None
    classes = as_classes("labels", labels)
    if len(classes) != size:
        raise ValueError(
            f"labels has {len(classes)} entries and the data set {size} samples: expected one "
            "class for each, in its order"
        )
    return torch.from_numpy(np.unique(classes, return_inverse=True)[1].astype(np.int64))


class ClassShare(NamedTuple):
    """A class, and how many of its samples its weights rest on: 1 / sum(w^2)."""

    label: Group
    samples: int
    effective_samples: float


class ClassByClassSampler(ResamplingSampler):
    """Draws for a second training, in which an early model says who of each class needs it most.

    Train the early one with class weights for a fifth of the steps, and a new model plainly with
    ``DataLoader(data, batch_size=64, sampler=sampler)``. Every class has the same share of the
    draws; inside a class, ``mix`` of it goes to all alike.

    Args:
        model: the early one.
        criterion: as of `global_weights`; class weights in it make no difference.
        loader, batch_size, forward, progress: as there.
        by: ``"gradients"``, IRW weights with S the worst-off ``alpha`` of each class;
            ``"losses"``, in proportion to the loss: the control, which needs no gradients.
        alpha: share of each class that makes S, in (0, 1]; not used by ``"losses"``.
        mix: in [0, 1].
        labels: (N,) classes in any form; None takes them out of the criterion's target.
        num_samples: draws an epoch; None takes N.
        generator: gives the seed of the draws.

    Attributes:
        classes: a `ClassShare` for each class.
        effective_share: of all N samples, how many the weights rest on, in (0, 1].

    Raises:
        TypeError, ValueError: an argument that does not fit; a target without classes.

    Warns:
        UserWarning: weights that rest on less than a third of a class, or of all.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> _ = torch.manual_seed(0)
    >>> data = TensorDataset(torch.randn(40, 2), torch.tensor([0] * 24 + [1] * 16))
    >>> loader, early = DataLoader(data, batch_size=8), nn.Linear(2, 2)
    >>> sampler = ClassByClassSampler(early, nn.CrossEntropyLoss(), loader, by="losses")
    >>> print(sampler)
    class 0: weights rest on 20 of 24 samples
    class 1: weights rest on 14 of 16 samples
    all: 0.82 of 40 samples
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        loader: DataLoader[Any],
        *,
        by: str = "gradients",
        alpha: float = 0.5,
        mix: float = 0.5,
        labels: ArrayLike | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        forward: Forward | None = None,
        progress: bool = True,
    ) -> None:
        rule = RULES[one_of("by", by, RULES)]
        local, reader = Options(alpha, mix=mix).local, DatasetReader(loader, batch_size)
        codes = class_codes(labels, reader.size)
        scheme = WithinClasses(local.alpha, rule, mix=local.mix, given=codes)
        record = weigh_by(scheme, model, criterion, reader, None, progress, forward=forward)
        super().__init__(record.weights, num_samples, generator=generator)
        assert record.labels is not None
        member, weights = record.labels.cpu(), self.weights.double()
        drawn = member[weights > 0].unique()  # samples whose target is ignored are in no class
        names = drawn.tolist()
        if labels is not None:
            names = np.unique(as_classes("labels", labels))[names].tolist()
        self.classes = tuple(
            ClassShare(name, int((member == number).sum()), _effective(weights[member == number]))
            for name, number in zip(names, drawn, strict=True)
        )
        self.effective_share = _effective(weights) / len(weights)
        few = [
            f"{effective:.0f} of the {size} samples of class {label}"
            for label, size, effective in self.classes
            if effective < FEW * size
        ]
        if self.effective_share < FEW:
            few.append(f"{self.effective_share:.2f} of all {len(weights)} samples")
        if few:
            warnings.warn(
                f"the weights rest on {' and on '.join(few)}, less than a third: the second model "
                "may learn these by heart; compare training and validation accuracy of each class, "
                "raise mix, or balance the classes instead",
                stacklevel=2,
            )

    def __str__(self) -> str:
        each = [
            f"class {label}: weights rest on {effective:.0f} of {size} samples"
            for label, size, effective in self.classes
        ]
        return "\n".join([*each, f"all: {self.effective_share:.2f} of {len(self.weights)} samples"])


def _effective(weights: Tensor) -> float:
    return float(weights.sum().square() / weights.square().sum())
