"""The draws of a second training, by weights that an early model gives each class by itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from irw_optim.gradients.protocol import PerSampleGradients
from irw_optim.metrics._groups import ArrayLike, Group, as_classes
from irw_optim.schemes.batch_losses import Forward
from irw_optim.schemes.deciding import WithinClasses, class_codes
from irw_optim.schemes.global_weights import weigh_by
from irw_optim.schemes.reading import DatasetReader
from irw_optim.schemes.resampling import ResamplingSampler
from irw_optim.weighting import Alignment
from irw_optim.weighting.ranges import check_alpha, check_options
from irw_optim.weighting.weights import ScoreRule

FEW = 1 / 3
"""Weights that rest on fewer of the samples have the second model learn them by heart: seen where a
rare class was right in 96 % of training and half of the test."""


@dataclass(frozen=True)
class _ByLoss:
    """Scores in proportion to the loss: the control, for which no gradient is needed."""

    needs_gradients = False

    def __call__(self, losses: Tensor, gradients: PerSampleGradients, worst_off: Tensor) -> Tensor:
        return losses.detach()


RULES: dict[str, ScoreRule] = {"gradients": Alignment(), "losses": _ByLoss()}


class ClassShare(NamedTuple):
    """A class of the data set, and how many of its samples its weights rest on: 1 / sum(w^2)."""

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
        loader: as there.
        by: ``"gradients"``, IRW weights with S the worst-off ``alpha`` of each class;
            ``"losses"``, in proportion to the loss: the control, which needs no gradients.
        alpha: share of each class that makes S, in (0, 1]; not used by ``"losses"``.
        mix: in [0, 1].
        labels: (N,) classes in any form; None takes them out of the criterion's target.
        num_samples: draws an epoch; None takes N.
        generator: gives the seed of the draws.
        batch_size: samples read at once; None takes the loader's.
        forward: as of `global_weights`, for batches that are no pairs.
        progress: show a bar.

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
    >>> [round(float(sampler.weights[data.tensors[1] == label].sum()), 4) for label in (0, 1)]
    [0.5, 0.5]
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
        if by not in RULES:
            raise ValueError(f"by={by!r}: expected one of {', '.join(map(repr, RULES))}")
        alpha = check_alpha(alpha)
        check_options(mix=mix)
        reader = DatasetReader(loader, batch_size)
        codes = class_codes(labels, reader.size)
        scheme = WithinClasses(alpha, RULES[by], mix=float(mix), given=codes)
        record = weigh_by(scheme, model, criterion, reader, None, progress, forward=forward)
        super().__init__(record.weights, num_samples, generator=generator)
        assert record.labels is not None
        member, weights = record.labels.cpu(), self.weights.double()
        drawn = member[weights > 0].unique()  # samples whose target is ignored are in no class
        names = drawn.tolist() if labels is None else np.unique(as_classes("labels", labels))
        self.classes = tuple(
            ClassShare(name, int((member == number).sum()), _effective(weights[member == number]))
            for name, number in zip(list(names), drawn, strict=True)
        )
        self.effective_share = _effective(weights) / len(weights)
        few = [
            f"{one.effective_samples:.0f} of the {one.samples} samples of class {one.label}"
            for one in self.classes
            if one.effective_samples < FEW * one.samples
        ]
        if self.effective_share < FEW:
            few.append(f"{self.effective_share:.2f} of all {len(weights)} samples")
        if few:
            warnings.warn(
                f"the weights rest on {' and on '.join(few)}, less than a third: the second model "
                "may learn these by heart; compare the accuracy of each class in training and "
                "validation, raise mix, or balance the classes instead",
                stacklevel=2,
            )

    def __str__(self) -> str:
        lines = [
            f"class {label}: weights rest on {effective:.0f} of {size} samples"
            for label, size, effective in self.classes
        ]
        lines.append(f"all: {self.effective_share:.2f} of {len(self.weights)} samples")
        return "\n".join(lines)


def _effective(weights: Tensor) -> float:
    """How many samples weights rest on, whatever they sum to."""
    return float(weights.sum().square() / weights.square().sum())
