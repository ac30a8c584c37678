"""What one trained model does on the validation data, in numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from irw_optim.metrics import worst_alpha_loss, worst_cell_accuracy

Numbers = npt.NDArray[Any]


class Metric(NamedTuple):
    """A column of the table.

    Attributes:
        name: its head.
        meaning: in words.
        sign: 1 where more is better, -1 where less is, 0 where neither.
        percent: whether it is a share.
    """

    name: str
    meaning: str
    sign: int = 1
    percent: bool = True


GROUP = Metric("worst group", "accuracy of the worst group that was named")
METRICS = (
    Metric("accuracy", "share of right predictions"),
    Metric("worst class", "accuracy of the worst class"),
    Metric("worst cell", "accuracy of the worst label × cluster cell"),
    Metric("score", "mean of worst class and worst cell: what to choose by without groups"),
    Metric("tail loss", "mean of the worst tenth of the log losses", -1, False),
    Metric("calibration error", "mean gap between confidence and accuracy, ten bins", -1),
    Metric("effective share", "effective sample size of the weights, share of N", 0),
    Metric("time", "seconds of training", 0, False),
)


def logits_of(outputs: Tensor, criterion: nn.Module) -> Tensor:
    """Outputs of a model, (N,), (N, 1) or (N, C), as logits (N, C) with C >= 2.

    Raises:
        ValueError: outputs of another shape.

    >>> logits_of(torch.tensor([2.0]), nn.BCEWithLogitsLoss())
    tensor([[0., 2.]])
    """
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.float()
    if outputs.ndim > 2 or (outputs.ndim == 2 and outputs.shape[1] == 0):
        raise ValueError(
            f"the model's outputs have shape {tuple(outputs.shape)}: expected (N, classes), or one "
            "number a sample for two classes"
        )
    one = outputs.float().flatten()
    if isinstance(criterion, nn.BCELoss):
        one = one.clamp(1e-7, 1 - 1e-7).logit()
    return torch.stack([torch.zeros_like(one), one], 1)


class Judge:
    """Measures models on one set of people; what does not depend on the model is made once.

    Attributes:
        labels: (N,) classes.
        parts: {"class": , "cell": , "group": } (N,) numbers from 0, -1 for whoever counts nowhere.
        names: of the parts, in the order of their numbers.
    """

    def __init__(
        self, labels: Tensor, clusters: Numbers, groups: Numbers | None, min_cell: int
    ) -> None:
        self.labels = labels.numpy()
        classes, member = np.unique(self.labels, return_inverse=True)
        self.parts = {"class": member.reshape(-1)}
        self.names: dict[str, list[Any]] = {"class": classes.tolist()}
        found = worst_cell_accuracy(self.labels, self.labels, clusters, min_cell=min_cell)
        cells = [cell for cell in found.cells if cell.counted]
        self.names["cell"] = [(cell.label, cell.clusters) for cell in cells]
        self.parts["cell"] = np.full(len(self.labels), -1)
        for number, cell in enumerate(cells):
            inside = (self.labels == cell.label) & np.isin(clusters, cell.clusters)
            self.parts["cell"][inside] = number
        if groups is not None:
            names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
            large = sizes >= min_cell
            if not large.any():
                raise ValueError(
                    f"min_cell={min_cell}: the largest group has {sizes.max()} people: give more "
                    "validation data, or a lower min_cell"
                )
            self.names["group"] = names[large].tolist()
            self.parts["group"] = np.where(large, large.cumsum() - 1, -1)[member.reshape(-1)]

    def sizes(self, kind: str) -> Numbers:
        """How many people each part has."""
        part = self.parts[kind]
        return np.bincount(part[part >= 0])

    def accuracies(self, kind: str, right: Numbers) -> Numbers:
        """Accuracy of each part, (M, parts), of M models: ``right`` (M, N)."""
        part, sizes = self.parts[kind], self.sizes(kind)
        inside = part >= 0
        hits = [np.bincount(part[inside], one[inside], len(sizes)) for one in right]
        return np.stack(hits) / sizes

    def score(self, right: Numbers) -> tuple[Numbers, Numbers]:
        """What to choose by, (M,), and how each person moves its mean over the models, (N,).

        The worst group where groups are named, else the mean of worst class and worst cell. By the
        delta method, the root of the sum of squares of the second is the standard error that comes
        from who happens to be in the validation data.
        """
        kinds = ["group"] if "group" in self.parts else ["class", "cell"]
        scores, moves = np.zeros(len(right)), np.zeros(right.shape[1])
        for kind in kinds:
            found = self.accuracies(kind, right)
            for i, worst in enumerate(found.argmin(1)):
                inside = self.parts[kind] == worst
                scores[i] += found[i, worst] / len(kinds)
                off = (right[i, inside] - found[i, worst]) / inside.sum()
                moves[inside] += off / len(kinds) / len(right)
        return scores, moves

    def measure(self, logits: Tensor) -> dict[str, float]:
        """A number for each metric that needs no training."""
        predicted = logits.argmax(1).numpy()
        right = (predicted == self.labels)[None]
        found = {"accuracy": float(right.mean())}
        for kind in self.parts:
            found[f"worst {kind}"] = float(self.accuracies(kind, right).min())
        found["score"] = (found["worst class"] + found["worst cell"]) / 2
        truth = torch.from_numpy(self.labels)
        losses = -logits.log_softmax(1).clamp(min=-100.0).gather(1, truth[:, None])[:, 0]
        found["tail loss"] = worst_alpha_loss(losses, 0.1)
        found["calibration error"] = calibration_error(logits, right[0])
        return found


def calibration_error(logits: Tensor, right: Numbers) -> float:
    """Mean |share of right predictions - confidence| over ten bins with as many people each."""
    from sklearn.calibration import calibration_curve

    confidence = logits.softmax(1).amax(1).clamp(0, 1).numpy()
    share, said = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    return float(np.abs(share - said).mean())


def accuracy_of(label: int, logits: Tensor, labels: Tensor) -> float:
    """Share of right predictions among the people of a class; NaN where there are none."""
    own = labels == label
    return float((logits[own].argmax(1) == label).double().mean())
