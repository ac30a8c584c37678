"""IRW as estimators of scikit-learn: an `IRWOptimizer` inside a skorch net, behind fit and predict.

Needs the extra: ``pip install "irw-optim[sklearn]"``.
"""

from __future__ import annotations

from typing import Any

try:
    import skorch  # noqa: F401
except ImportError as error:
    raise ImportError('irw_optim.sklearn needs skorch: pip install "irw-optim[sklearn]"') from error

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import nn

from irw_optim.arguments import as_real
from irw_optim.optimizer.irw_optimizer import ScoreParameters
from irw_optim.weighting import ScoreRule
from irw_optim.weighting.outliers import OutlierFilter

from ._net import Estimator, ReweightedClassifier, ReweightedRegressor, mlp, refuse, takes

__all__ = ["IRWClassifier", "IRWRegressor", "mlp"]


class IRWClassifier(ClassifierMixin, Estimator):  # type: ignore[misc]
    """A neural network trained with intrinsic reweighting, as a classifier of scikit-learn.

    Each `fit` makes module, criterion and optimizer, and trains on shuffled batches with skorch and
    `irw_optim.IRWOptimizer`. Arguments of what is made have its prefix: ``module__dropout=0.1``,
    ``optimizer__weight_decay=1e-4``, ``criterion__label_smoothing=0.1``. Standardise the columns of
    X first. X may be sparse: it is made dense batch by batch.

    Args:
        module: None for `mlp`, or a class, function or instance from float32 rows
            (B, features, ...) to logits (B, classes). Arguments ``n_features`` and ``n_outputs`` of
            a class or function are filled in; an instance is copied for every fit.
        alpha: lower bound on the share of the smallest group, in (0, 1].
        outliers, center, class_balance, mix, warmup_steps, score_parameters, weighting, engine:
            those of `irw_optim.IRWOptimizer`.
        class_weight: None, ``"balanced"``, or {label: factor}: the criterion's ``weight=``, which
            the worst-off are found with.
        threshold: for two classes: `predict` says ``classes_[1]`` from this probability on. None
            takes the likeliest class.
        criterion: None for `torch.nn.CrossEntropyLoss`, or a class that takes logits and class
            numbers.
        optimizer: the class of any torch optimizer.
        lr, max_epochs, callbacks, device, verbose: those of skorch.
        batch_size: samples in a batch; the worst-off are alpha * batch_size of them.
        train_split: None, or a split of skorch such as ``ValidSplit(5, stratified=True)``.
        predict_nonlinearity: from outputs to probabilities; ``"auto"`` is softmax for
            `torch.nn.CrossEntropyLoss`, nothing for others.
        random_state: a seed, a `numpy.random.RandomState`, or None for NumPy's global one; torch's
            own is left as it was.

    Attributes:
        classes_: (C,) the labels, sorted.
        n_features_in_: columns of X.
        feature_names_in_: their names, where they are strings.
        net_: skorch's net, with ``module_``, ``history`` and ``optimizer_``, the `IRWOptimizer`.

    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(StandardScaler(), IRWClassifier(alpha=0.3, random_state=0))
    >>> model.fit(X, y).predict_proba(X).shape
    (150, 3)
    """

    _net = ReweightedClassifier
    _criterion = nn.CrossEntropyLoss
    _meaning = "one for each class of y"
    classes_: npt.NDArray[Any]

    def __init__(
        self,
        module: Any = None,
        *,
        alpha: float = 0.3,
        outliers: OutlierFilter | None = None,
        center: float = 0.0,
        class_balance: bool = False,
        mix: float = 0.0,
        warmup_steps: int = 0,
        score_parameters: ScoreParameters = None,
        weighting: str | ScoreRule = "irw",
        engine: str = "auto",
        class_weight: Any = None,
        threshold: float | None = None,
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
        self._keep(locals())

    def fit(self, X: Any, y: Any, **refused: Any) -> IRWClassifier:
        """Train a new net on (N, features) and N labels, which may be strings.

        Raises:
            TypeError, ValueError: impossible data or arguments; ``sample_weight``.
        """
        refuse(refused)
        return self._fit(X, y, self.max_epochs)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, **refused: Any) -> IRWClassifier:
        """Train on, one pass over these data; the first call begins, and is told all classes.

        Raises:
            TypeError, ValueError: as of `fit`; no classes at first, other ones or labels later.
        """
        refuse(refused)
        begin = not hasattr(self, "net_")
        if begin and classes is None:
            raise ValueError(
                "classes=None in the first call of partial_fit: expected all labels that there "
                "will be, partial_fit(X, y, classes=numpy.unique(all_labels))"
            )
        if begin and isinstance(self.class_weight, str):
            raise ValueError(
                f"class_weight={self.class_weight!r} needs all data at once: expected fit, or "
                "{label: factor} for partial_fit"
            )
        return self._fit(X, y, 1, begin, classes)

    def _fit(
        self, X: Any, y: Any, epochs: int, begin: bool = True, classes: Any = None
    ) -> IRWClassifier:
        X, y = self._checked(X, y, reset=begin)
        check_classification_targets(y)
        told = np.unique(y if classes is None else classes)
        known = told if begin else self.classes_
        if classes is not None and not np.array_equal(told, known):
            raise ValueError(
                f"classes={classes!r}: expected those of the first call, {known.tolist()}, or None"
            )
        if len(unknown := np.setdiff1d(y, known)):
            raise ValueError(
                f"y has labels that are not among classes: {unknown.tolist()}; expected some of "
                f"{known.tolist()}, or fit on all of them"
            )
        net = self._new_net(known, X, y) if begin else self.net_
        self.classes_ = known
        return self._train(net, X, np.searchsorted(known, y), epochs)  # type: ignore[no-any-return]

    def _new_net(self, classes: npt.NDArray[Any], X: Any, y: Any) -> Any:
        self._check_threshold(len(classes))
        options = {}
        if self.class_weight is not None:
            if self.criterion is not None and not takes(self.criterion, "weight"):
                raise TypeError(
                    f"class_weight={self.class_weight!r} goes to the criterion as weight=: "
                    "expected criterion=torch.nn.CrossEntropyLoss or another class with it, not "
                    f"{self.criterion}"
                )
            factors = compute_class_weight(self.class_weight, classes=classes, y=y)
            options["criterion__weight"] = torch.as_tensor(factors, dtype=torch.float32)
        return self._begin(X, len(classes), **options)

    def _check_threshold(self, classes: int) -> None:
        if self.threshold is None:
            return
        share = as_real(self.threshold)
        if classes != 2 or share is None or not 0 <= share <= 1:
            raise ValueError(
                f"threshold={self.threshold!r} with {classes} classes: expected None, which takes "
                "the likeliest, or for two a probability in [0, 1] from which on it is classes_[1]"
            )

    def predict_proba(self, X: Any) -> npt.NDArray[Any]:
        """Probabilities (N, classes), in the order of ``classes_``.

        Raises:
            ValueError: what the module gives are no probabilities.
        """
        scores = self._predicted(X).astype(np.float64)
        if (scores < 0).any() or (abs(scores.sum(1) - 1) > 1e-3).any():
            raise ValueError(
                f"predict_nonlinearity={self.predict_nonlinearity!r} makes no probabilities with "
                f"the criterion {self.net_.criterion_}: expected a function from the module's "
                "output, such as functools.partial(torch.softmax, dim=1)"
            )
        return scores / scores.sum(1, keepdims=True)  # type: ignore[no-any-return]

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The likeliest label of each row, or by ``threshold``."""
        check_is_fitted(self, "net_")
        self._check_threshold(len(self.classes_))
        if self.threshold is None:
            return self.classes_[self._predicted(X).argmax(1)]  # type: ignore[no-any-return]
        second = self.predict_proba(X)[:, 1] >= self.threshold
        return self.classes_[second.astype(int)]  # type: ignore[no-any-return]


class IRWRegressor(RegressorMixin, Estimator):  # type: ignore[misc]
    """A neural network trained with intrinsic reweighting, as a regressor of scikit-learn.

    Arguments and attributes are those of `IRWClassifier` that do not speak of classes. The
    criterion, `torch.nn.MSELoss` where none is given, gets outputs and targets of shape (B, 1).
    Scale y, with `sklearn.compose.TransformedTargetRegressor`, say.

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
        self._keep(locals())

    def fit(self, X: Any, y: Any, **refused: Any) -> IRWRegressor:
        """Train a new net on (N, features) and targets (N,); see `IRWClassifier.fit`."""
        return self._fit(X, y, refused, self.max_epochs, begin=True)

    def partial_fit(self, X: Any, y: Any, **refused: Any) -> IRWRegressor:
        """Train on, one pass over these data; the first call begins."""
        return self._fit(X, y, refused, epochs=1, begin=not hasattr(self, "net_"))

    def _fit(self, X: Any, y: Any, refused: Any, epochs: int, begin: bool) -> IRWRegressor:
        refuse(refused)
        X, y = self._checked(X, y, reset=begin, y_numeric=True)
        net = self._begin(X, n_outputs=1) if begin else self.net_
        return self._train(net, X, y.astype(np.float32)[:, None], epochs)  # type: ignore[no-any-return]

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The prediction for each row, (N,)."""
        return self._predicted(X)[:, 0]  # type: ignore[no-any-return]
