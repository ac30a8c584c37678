"""What one trained model does on the validation data, in numbers, and to whom."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irw_optim.metrics import worst_alpha_loss, worst_cell_accuracy
from irw_optim.metrics._groups import (
    as_array,
    as_columns,
    as_rows,
    as_vector,
    check_lengths,
    intersect,
)
from irw_optim.metrics._reports import kmeans

Numbers = npt.NDArray[Any]


class Metric(NamedTuple):
    """A column; ``sign`` is 1 where more is better, -1 where less is; ``percent`` is for shares."""

    name: str
    meaning: str
    sign: int = 1
    percent: bool = True


METRICS = (
    Metric("accuracy", "share of right predictions"),
    Metric("worst group", "accuracy of the worst group that was named"),
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

    ``parts`` has (N,) numbers of everybody's ``"class"``, ``"cell"`` and, where groups are named,
    ``"group"``, -1 for whoever counts nowhere; ``names`` has the names of these numbers.
    """

    def __init__(
        self, labels: Tensor, clusters: Numbers, groups: Numbers | None, min_cell: int
    ) -> None:
        self.labels = labels.numpy()
        self.names: dict[str, list[Any]] = {}
        self.parts: dict[str, Numbers] = {}
        self.names["class"], self.parts["class"] = intersect({"class": self.labels})
        found = worst_cell_accuracy(self.labels, self.labels, clusters, min_cell=min_cell)
        cells = [cell for cell in found.cells if cell.counted]
        self.names["cell"] = [(cell.label, cell.clusters) for cell in cells]
        self.parts["cell"] = np.full(len(self.labels), -1)
        for number, cell in enumerate(cells):
            inside = (self.labels == cell.label) & np.isin(clusters, cell.clusters)
            self.parts["cell"][inside] = number
        if groups is not None:
            names, member = intersect({"group": groups})
            sizes = np.bincount(member)
            large = sizes >= min_cell
            if not large.any():
                raise ValueError(
                    f"min_cell={min_cell}: the largest group has {sizes.max()} people: give more "
                    "validation data, or a lower min_cell"
                )
            self.names["group"] = [names[number] for number in np.flatnonzero(large)]
            self.parts["group"] = np.where(large, large.cumsum() - 1, -1)[member]

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

    def moves(self, right: Numbers) -> Numbers:
        """How each person moves what to choose by, (N,), in the mean over the models.

        That is the worst group where groups are named, else the mean of worst class and worst cell.
        By the delta method, the root of the sum of squares is the standard error that comes from
        who happens to be in the validation data.
        """
        kinds = ["group"] if "group" in self.parts else ["class", "cell"]
        moves = np.zeros(right.shape[1])
        for kind in kinds:
            found = self.accuracies(kind, right)
            for one, accuracies in zip(right, found, strict=True):
                inside = self.parts[kind] == accuracies.argmin()
                off = (one[inside] - accuracies.min()) / inside.sum()
                moves[inside] += off / len(kinds) / len(right)
        return moves

    def measure(self, logits: Tensor) -> dict[str, float]:
        """A number for each metric that needs no training."""
        predicted = logits.argmax(1).numpy()
        right = (predicted == self.labels)[None]
        found = {"accuracy": float(right.mean())}
        for kind in self.parts:
            found[f"worst {kind}"] = float(self.accuracies(kind, right).min())
        found["score"] = (found["worst class"] + found["worst cell"]) / 2
        truth = torch.from_numpy(self.labels)
        losses = F.cross_entropy(logits, truth, reduction="none").clamp(max=100.0)
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


def rarest(labels: Tensor, judged: Tensor) -> int:
    """Of the classes that are judged, the one that fewest of ``labels`` are of."""
    found: list[int] = judged.unique().tolist()
    return min(found, key=lambda label: int((labels == label).sum()))


def group_names(groups: Any, people: Sized) -> Numbers:
    """The group of each person, (N,): the values of all columns, numbers with the column's name."""
    columns = as_columns(groups)
    for name, column in columns.items():
        check_lengths(**{"validation": people, f"groups[{name!r}]": column})
    texts = [
        [str(v) if column.dtype.kind in "US" else f"{name} {v}" for v in column]
        for name, column in columns.items()
    ]
    return np.array([", ".join(values) for values in zip(*texts, strict=True)])


def cluster_numbers(inputs: Any, clusters: Any, n_clusters: int, people: Sized) -> Numbers:
    """The cluster of each person, (N,): as given, or by k-means of the inputs as they are."""
    if clusters is not None:
        numbers = as_vector("clusters", clusters, "cluster")
        check_lengths(validation=people, clusters=numbers)
        return intersect({"cluster": numbers})[1]
    try:
        rows = as_rows(as_array(inputs))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"validation inputs cannot be clustered ({error}): give clusters=, (N,) numbers from "
            "any clustering of them, or of an embedding"
        ) from error
    return kmeans(rows, min(n_clusters, len(rows)), 0)


def unseen_by_clusters(inputs: Numbers | None, judge: Judge, right: Numbers) -> str | None:
    """Why the score by clusters may be blind here, of plain training's ``right`` (seeds, N).

    A shortcut that one feature shows does not move a cluster's centre. So a tree with a leaf a
    class looks for one: who is misled by it, and do they fare worse than the worst cell?
    """
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.tree import DecisionTreeClassifier

    least = float(judge.accuracies("cell", right).mean(0).min())
    if inputs is not None:
        leaves = max(2, len(judge.names["class"]))
        tree = DecisionTreeClassifier(max_leaf_nodes=leaves, class_weight="balanced")
        said = tree.fit(inputs, judge.labels).predict(inputs)
        told = balanced_accuracy_score(judge.labels, said)
        for label in judge.names["class"] if told >= TOLD else []:
            misled = (judge.labels == label) & (said != label)
            if misled.sum() >= MISLED and (share := float(right[:, misled].mean())) < least - NEAR:
                return (
                    f"feature {tree.tree_.feature[0]} alone tells {told:.0%} of the classes; of "
                    f"{misled.sum()} people of class {label} whom it misleads plain training gets "
                    f"{share:.0%} right, {least:.0%} in the worst cell: the clusters do not see "
                    "this shortcut, and the score may prefer the models that use it"
                )
    if least > max(0.01, float(judge.accuracies("class", right).mean(0).min()) - 0.01):
        return (
            "no cluster fares worse than its class: the clusters say nothing that the classes do "
            "not, and a group that they do not see (a shortcut, say) would be missed"
        )
    return None


TOLD, MISLED, NEAR = 0.9, 20, 0.1
"""A shortcut tells that share of the classes, misleads as many, who fare so much worse."""
