"""What classifier and regressor share: skorch's net with `IRWOptimizer`, arguments, randomness."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from irw_optim.arguments import whole_number
from irw_optim.optimizer import IRWOptimizer

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before scikit-learn 1.6

    def validate_data(estimator: Any, *arrays: Any, **options: Any) -> Any:
        return estimator._validate_data(*arrays, **options)


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
        hidden_layer_sizes: one width a layer.
        dropout: probability after each hidden layer.

    >>> mlp(10, 2, hidden_layer_sizes=(16,))
    Sequential(
      (0): Linear(in_features=10, out_features=16, bias=True)
      (1): ReLU()
      (2): Linear(in_features=16, out_features=2, bias=True)
    )
    """
    widths, layers = [n_features, *hidden_layer_sizes], list[nn.Module]()
    for width_in, width in pairwise(widths):
        layers += [nn.Linear(width_in, width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], n_outputs))


class Rows(Dataset[Any]):
    """Arrays cut into whole batches, and made dense only there: row by row takes longer."""

    def __init__(self, X: Any, y: Any = None) -> None:
        self.X = X
        self.y = np.zeros(X.shape[0], np.int64) if y is None else y  # skorch wants two

    def __len__(self) -> int:
        return int(self.X.shape[0])

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        x = self.X[rows]
        if sparse.issparse(x):
            x = x.toarray()
        return torch.as_tensor(x), torch.as_tensor(self.y[rows])


IN_BATCHES: dict[str, Any] = {
    "dataset": Rows,
    "iterator_train__shuffle": True,
    "iterator_train__collate_fn": tuple,  # which they are already
    "iterator_valid__collate_fn": tuple,
}


class Reweighted(NeuralNet):  # type: ignore[misc]
    """A net of skorch whose optimizer is wrapped."""

    def __init__(self, *args: Any, irw: dict[str, Any], **options: Any) -> None:
        super().__init__(*args, **options)
        self.irw = irw

    def initialize_optimizer(self, *args: Any, **options: Any) -> Any:
        super().initialize_optimizer(*args, **options)
        self._widened(self.criterion_)
        own = {"model": self.module_, "criterion": self.criterion_, **self.irw}
        self.optimizer_: Any = IRWOptimizer(self.optimizer_, **own)
        return self

    def infer(self, x: Any, **options: Any) -> Any:
        return super().infer(self._widened(x), **options)

    def get_loss(self, y_pred: Any, y_true: Any, **options: Any) -> Any:
        return super().get_loss(y_pred, self._widened(y_true), **options)

    def _widened(self, thing: Any) -> Any:
        """In float64 if the module is, as where that is torch's default."""
        wide = any(p.dtype is torch.float64 for p in self.module_.parameters())
        return thing.double() if wide and getattr(thing, "dtype", None) != torch.int64 else thing


class ReweightedClassifier(Reweighted, NeuralNetClassifier):  # type: ignore[misc]
    pass


class ReweightedRegressor(Reweighted, NeuralNetRegressor):  # type: ignore[misc]
    pass


PREFIXES = ("module", "criterion", "optimizer", "iterator_train", "iterator_valid", "callbacks")


class Estimator(BaseEstimator):  # type: ignore[misc]
    """What does not look at y."""

    _net: ClassVar[type[Any]]
    _criterion: ClassVar[type[nn.Module]]
    _meaning: ClassVar[str]

    def _keep(self, given: dict[str, Any]) -> None:
        del given["self"]
        nested = given.pop("nested")
        for name in nested:
            if not _has_prefix(name):
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}: expected one of "
                    f"{', '.join(self._get_param_names())}, or an argument of what it builds, as "
                    f"module__dropout=0.1 (prefixes: {'__, '.join(PREFIXES)}__)"
                )
        self.__dict__.update(given, **nested)

    def _nested(self, start: str = "") -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if _has_prefix(k) and k.startswith(start)}

    def _taken_by(self, maker: Any) -> dict[str, Any]:
        made = ("module", "criterion", "optimizer")
        return {k: v for k, v in vars(self).items() if takes(maker, k) and k not in made}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {**super().get_params(deep=deep), **self._nested()}

    def set_params(self, **params: Any) -> Any:
        """Set arguments, also with a prefix; the next `fit` takes them, `threshold` counts at once.

        Raises:
            ValueError: an argument that there is not.
        """
        nested = {name: value for name, value in params.items() if _has_prefix(name)}
        super().set_params(**{name: v for name, v in params.items() if name not in nested})
        self.__dict__.update(nested)
        return self

    def _checked(self, *arrays: Any, reset: bool, **options: Any) -> Any:
        return validate_data(
            self,
            *arrays,
            reset=reset,
            dtype=np.float32,
            accept_sparse="csr",
            allow_nd=self.module is not None,
            **options,
        )

    def _predicted(self, X: Any) -> Any:
        check_is_fitted(self, "net_")
        return self.net_.predict_proba(self._checked(X, reset=False))

    def _begin(self, X: Any, n_outputs: int, **options: Any) -> Any:
        """Make a new net; a fit that fails later leaves none behind."""
        self.__dict__.pop("net_", None)
        self._random = check_random_state(self.random_state)
        whole_number("max_epochs", self.max_epochs, least=1)
        if not callable(self.optimizer) or isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"optimizer is of the type {type(self.optimizer).__name__}: expected a class such "
                "as torch.optim.SGD, with its arguments as lr=0.1 and optimizer__momentum=0.9"
            )
        maker = mlp if self.module is None else self.module
        sizes = {"n_features": X.shape[1], "n_outputs": n_outputs}
        told = {f"module__{n}": size for n, size in sizes.items() if takes(maker, n)}
        criterion = self._criterion if self.criterion is None else self.criterion
        with self._seeded():
            net = self._net(
                self._new("module", maker, told),
                criterion=self._new("criterion", criterion, options),
                optimizer=self.optimizer,
                irw=self._taken_by(IRWOptimizer),
                **self._taken_by(NeuralNet),
                **(IN_BATCHES | told | self._nested()),
                **options,
            ).initialize()
            output = net.forward(X[:1])
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape)
        if shape != (1, n_outputs):
            raise ValueError(
                f"module gives one row of X an output of shape {shape}: expected (1, {n_outputs}), "
                f"{self._meaning}, as by torch.nn.Linear(..., {n_outputs}); a constructor with "
                "arguments n_features and n_outputs is told both"
            )
        return net

    def _new(self, name: str, given: Any, told: Mapping[str, Any]) -> Any:
        """What to make module or criterion of: one that is made already is copied."""
        nested, kind = self._nested(f"{name}__"), type(given).__name__
        if isinstance(given, nn.Module):
            if nested:
                raise TypeError(
                    f"{name} is a {kind} that is made already, so {nested} comes too late: "
                    f"expected the class, {name}={kind}, and its arguments as {name}__..."
                )
            return copy.deepcopy(given)
        try:
            arguments = {k.partition("__")[2]: v for k, v in {**told, **nested}.items()}
            inspect.signature(given).bind(**arguments)
        except TypeError as error:
            raise TypeError(
                f"{name}={given!r} cannot make one: {error}; expected the class of a "
                f"torch.nn.Module, or a function that makes one, with arguments as {name}__..., or "
                "criterion=irw_optim.PerSampleLoss(function of outputs and targets)"
            ) from error
        return given

    def _train(self, net: Any, X: Any, y: Any, epochs: int) -> Any:
        with self._seeded():
            net.partial_fit(X, y, epochs=epochs)
        self.net_ = net
        return self

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Let torch draw from ``random_state`` in here alone."""
        device = torch.device(self.device or "cpu")
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._random.randint(2**31 - 1))
            yield

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _has_prefix(name: str) -> bool:
    prefix, _, rest = name.partition("__")
    return prefix in PREFIXES and bool(rest)


def takes(maker: Any, argument: str) -> bool:
    made = isinstance(maker, nn.Module) or not callable(maker)
    return not made and argument in inspect.signature(maker).parameters


def refuse(keywords: dict[str, Any]) -> None:
    if keywords.pop("sample_weight", None) is not None:
        raise TypeError(
            "sample_weight is not taken, since IRW decides how much a sample counts: expected "
            "class_weight={label: weight}, class_balance=True, or a loop of your own with "
            "IRWOptimizer and optimizer.backward(losses * weights)"
        )
    if keywords:
        raise TypeError(f"fit() got an unexpected keyword argument {next(iter(keywords))!r}")
