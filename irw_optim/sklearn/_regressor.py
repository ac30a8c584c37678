"""IRWRegressor: one number a row, on what both estimators share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import RegressorMixin
from torch import nn

from irw_optim.gradients.selection import ScoreParameters
from irw_optim.sklearn._estimator import Estimator, refuse
from irw_optim.sklearn._net import ReweightedRegressor
from irw_optim.weighting import ScoreRule
from irw_optim.weighting.outliers import OutlierFilter


class IRWRegressor(RegressorMixin, Estimator):  # type: ignore[misc]
    """A neural network trained with intrinsic reweighting, as a regressor of scikit-learn.

    Arguments and attributes are those of `IRWClassifier`, where they do not speak of classes. The
    criterion is `torch.nn.MSELoss` where none is given, and gets outputs and targets of shape
    (B, 1). Scale y, for example with `sklearn.compose.TransformedTargetRegressor`.

    >>> from sklearn.datasets import make_regression
    >>> from sklearn.preprocessing import scale
    >>> X, y = make_regression(n_samples=100, n_features=3, random_state=0)
    >>> IRWRegressor(alpha=0.3, random_state=0).fit(X, scale(y)).predict(X).shape
    (100,)
    """

    _net = ReweightedRegressor
    _criterion = nn.MSELoss
    _meaning = "one number a row"

    def __init__(
        self,
        module: Any = None,
        *,
        alpha: float = 0.3,
        outliers: OutlierFilter | None = None,
        center: float = 0.0,
        mix: float = 0.0,
        warmup_steps: int = 0,
        score_parameters: ScoreParameters = None,
        weighting: str | ScoreRule = "irw",
        engine: str = "auto",
        criterion: Any = None,
        optimizer: Any = torch.optim.Adam,
        lr: float = 0.001,
        max_epochs: int = 50,
        batch_size: int = 64,
        callbacks: Any = None,
        train_split: Any = None,
        predict_nonlinearity: Any = "auto",
        device: Any = "cpu",
        random_state: Any = None,
        verbose: int = 0,
        **nested: Any,
    ) -> None:
        self.module = module
        self.alpha = alpha
        self.outliers = outliers
        self.center = center
        self.mix = mix
        self.warmup_steps = warmup_steps
        self.score_parameters = score_parameters
        self.weighting = weighting
        self.engine = engine
        self.criterion = criterion
        self.optimizer = optimizer
        self.lr = lr
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.callbacks = callbacks
        self.train_split = train_split
        self.predict_nonlinearity = predict_nonlinearity
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
        self._take(nested)

    def fit(self, X: Any, y: Any, **refused: Any) -> IRWRegressor:
        """Train a new net on (N, features) and targets (N,).

        Raises:
            TypeError, ValueError: data or arguments that are impossible; ``sample_weight``.
        """
        return self._fit(X, y, refused, self.max_epochs, begin=True)

    def partial_fit(self, X: Any, y: Any, **refused: Any) -> IRWRegressor:
        """Train on, one pass over these data; the first call begins."""
        return self._fit(X, y, refused, epochs=1, begin=not hasattr(self, "net_"))

    def _fit(
        self, X: Any, y: Any, refused: dict[str, Any], epochs: int, begin: bool
    ) -> IRWRegressor:
        refuse(refused)
        X, y = self._checked(X, y, reset=begin, y_numeric=True)
        if begin:
            self._begin(X, n_outputs=1)
        return self._train(X, y.astype(np.float32)[:, None], epochs)  # type: ignore[no-any-return]

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The prediction for each row, (N,)."""
        return self._predicted(X)[:, 0]  # type: ignore[no-any-return]
