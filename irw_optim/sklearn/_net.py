"""What the estimators train: skorch's nets, with `IRWOptimizer` around the optimizer they make."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse
from skorch import NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn
from torch.utils.data import Dataset

from irw_optim.optimizer import IRWOptimizer


def mlp(
    n_features: int,
    n_outputs: int,
    hidden_layer_sizes: Sequence[int] = (64, 32),
    dropout: float = 0.0,
) -> nn.Sequential:
    """A multilayer perceptron with ReLU, the module of the estimators where none is given.

    Args:
        n_features: columns of X.
        n_outputs: classes, or columns of y.
        hidden_layer_sizes: the width of each hidden layer.
        dropout: probability with which a hidden unit is dropped in training.

    >>> mlp(10, 2, hidden_layer_sizes=(16,))
    Sequential(
      (0): Linear(in_features=10, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=2, bias=True)
    )
    """
    layers: list[nn.Module] = []
    for width_in, width in pairwise([n_features, *hidden_layer_sizes]):
        layers += [nn.Linear(width_in, width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear([n_features, *hidden_layer_sizes][-1], n_outputs))


class Rows(Dataset[Any]):
    """Arrays cut into whole batches, and made dense only there.

    skorch's data set cuts row by row, which takes longer than the step where X is sparse.
    """

    def __init__(self, X: Any, y: Any = None) -> None:
        self.X = X
        self.y = np.zeros(X.shape[0], dtype=np.int64) if y is None else y  # skorch wants two

    def __len__(self) -> int:
        return int(self.X.shape[0])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([row])
        return x[0], y[0]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        x = self.X[rows]
        if sparse.issparse(x):
            x = x.toarray()
        return torch.as_tensor(x), torch.as_tensor(self.y[rows])


def whole(batch: Any) -> Any:
    """The batch as it is: `Rows` has put it together."""
    return batch


IN_BATCHES = {
    "dataset": Rows,
    "iterator_train__shuffle": True,
    "iterator_train__collate_fn": whole,
    "iterator_valid__collate_fn": whole,
}


class Reweighted:
    """Wraps the optimizer that a net of skorch makes; ``irw`` has the options."""

    def __init__(self, *args: Any, irw: dict[str, Any], **options: Any) -> None:
        super().__init__(*args, **options)
        self.irw = irw

    def initialize_optimizer(self, *args: Any, **options: Any) -> Any:
        """Make the optimizer as skorch does, and wrap it."""
        super().initialize_optimizer(*args, **options)  # type: ignore[misc]
        self.optimizer_: Any = IRWOptimizer(
            self.optimizer_,
            model=self.module_,  # type: ignore[attr-defined]
            criterion=self.criterion_,  # type: ignore[attr-defined]
            **self.irw,
        )
        return self


class ReweightedClassifier(Reweighted, NeuralNetClassifier):  # type: ignore[misc]
    """skorch's classifier with IRW."""


class ReweightedRegressor(Reweighted, NeuralNetRegressor):  # type: ignore[misc]
    """skorch's regressor with IRW."""
