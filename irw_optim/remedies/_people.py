"""Who may be served badly: groups that were named, clusters in their place, and what those miss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from irw_optim.metrics._clusters import as_rows, kmeans
from irw_optim.metrics._inputs import as_array, as_columns, as_vector
from irw_optim.remedies._data import Samples
from irw_optim.remedies._measuring import Judge, Numbers
from irw_optim.schemes.batch_losses import Forward


def group_names(groups: Any, size: int) -> Numbers:
    """The group of each person, (N,): the values of all columns, numbers with the column's name."""
    columns = as_columns(groups)
    for name, column in columns.items():
        _check_length(f"groups[{name!r}]", column, size)
    texts = [
        [str(v) if column.dtype.kind in "US" else f"{name} {v}" for v in column]
        for name, column in columns.items()
    ]
    return np.array([", ".join(values) for values in zip(*texts, strict=True)])


def cluster_numbers(inputs: Any, clusters: Any, n_clusters: int, size: int) -> Numbers:
    """The cluster of each person, (N,): as given, or by k-means of the inputs as they are."""
    if clusters is not None:
        numbers = as_vector("clusters", clusters, "cluster")
        _check_length("clusters", numbers, size)
        return np.unique(numbers, return_inverse=True)[1].reshape(-1)
    try:
        rows = as_rows(as_array(inputs))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"validation inputs cannot be clustered ({error}): give clusters=, (N,) numbers from "
            "any clustering of them, or of an embedding"
        ) from error
    return kmeans(rows, min(n_clusters, len(rows)), 0)


def _check_length(name: str, values: Numbers, size: int) -> None:
    if len(values) != size:
        raise ValueError(
            f"{name} has {len(values)} entries and validation {size} samples: expected one for each"
        )


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


def oracle_logits(
    model: nn.Module,
    samples: Samples,
    criterion: nn.Module,
    forward: Forward | None,
    judge: Judge,
    classes: int,
) -> Tensor:
    """Logits (N, C) of plain training's model, its last layer fitted again with groups balanced.

    Each half of the people is decided by a layer fitted to the other half, whose groups it is told
    (Kirichenko et al. 2023, "Last layer re-training is sufficient").
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    seen: list[Tensor] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
        for module in linear[-1:]
    ]
    outputs, labels = samples.read(model, criterion, forward)
    for hook in hooks:
        hook.remove()
    features = torch.cat(seen).cpu() if seen else outputs
    if features.ndim != 2 or len(features) != len(labels):
        features = outputs.reshape(len(labels), -1)
    x, y, codes = StandardScaler().fit_transform(features), labels.numpy(), judge.parts["group"]
    weight = (codes >= 0) / np.bincount(codes + 1, minlength=2)[codes + 1].clip(min=1)
    found = torch.full((len(y), classes), -100.0)
    halves = StratifiedKFold(2, shuffle=True, random_state=0)
    for one, other in halves.split(x, np.maximum(codes, 0)):
        scaled = weight[one] / weight[one].mean()
        fit = LogisticRegression(max_iter=1000).fit(x[one], y[one], scaled)
        said = np.log(fit.predict_proba(x[other]).clip(min=1e-30))
        found[np.ix_(other, fit.classes_)] = torch.from_numpy(said).float()
    return found
