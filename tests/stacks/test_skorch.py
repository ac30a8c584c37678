"""skorch: an estimator of scikit-learn that trains with IRW."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import ALPHA, BATCH, BATCHES, Net, equal, make_data, plain_loop
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

from irw_optim import IRWOptimizer

skorch = pytest.importorskip("skorch")
from skorch.callbacks import GradientNormClipping, LRScheduler  # noqa: E402


class ReweightedClassifier(skorch.NeuralNetClassifier):
    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        super().initialize_optimizer(*args, **kwargs)
        self.optimizer_ = IRWOptimizer(
            self.optimizer_, alpha=ALPHA, model=self.module_, criterion=self.criterion_
        )
        return self


def make(**options: Any) -> ReweightedClassifier:
    return ReweightedClassifier(
        **{
            "module": Net,
            "criterion": nn.CrossEntropyLoss,
            "optimizer": torch.optim.SGD,
            "lr": 0.1,
            "optimizer__momentum": 0.9,
            "batch_size": BATCH,
            "max_epochs": 1,
            "train_split": None,
            "verbose": 0,
            **options,
        },
    )


def data() -> tuple[Any, Any]:
    x, y = make_data()
    return x.numpy(), y.numpy()


def test_fit() -> None:
    net = make(max_epochs=2).fit(*data())
    assert equal(net.module_, plain_loop(epochs=2)[0])
    assert net.optimizer_.steps == 2 * BATCHES
    assert net.predict(data()[0]).shape == (BATCH * BATCHES,)


def test_partial_fit_goes_on() -> None:
    net = make().partial_fit(*data()).partial_fit(*data())
    assert equal(net.module_, plain_loop(epochs=2)[0])


def test_fit_begins_anew() -> None:
    net = make().fit(*data()).fit(*data())
    assert equal(net.module_, plain_loop()[0])
    assert net.optimizer_.steps == BATCHES


def test_callbacks() -> None:
    clipping = GradientNormClipping(1e-2)
    scheduler = LRScheduler(torch.optim.lr_scheduler.ConstantLR, factor=1.0, step_every="batch")
    net = make(callbacks=[clipping, scheduler]).fit(*data())
    assert equal(net.module_, plain_loop(clip=1e-2)[0])


def test_the_criterion_that_skorch_takes_by_default() -> None:
    class Probabilities(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(1)

    net = make(module=Probabilities, criterion=nn.NLLLoss).fit(*data())
    expected, _ = plain_loop()
    for p, q in zip(net.module_.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["copy", "pickle"],
)
def test_copies_train_on_by_themselves(duplicate: Any) -> None:
    net = make().fit(*data())
    twin = duplicate(net)
    net.partial_fit(*data())
    assert not equal(twin.module_, list(net.module_.parameters()))
    twin.partial_fit(*data())
    assert equal(twin.module_, list(net.module_.parameters()))
    assert twin.optimizer_.steps == 2 * BATCHES


def test_saving(tmp_path: Path) -> None:
    files = {"f_params": str(tmp_path / "model.pt"), "f_optimizer": str(tmp_path / "optimizer.pt")}
    net = make().fit(*data())
    net.save_params(**files)
    other = make().initialize()
    other.load_params(**files)
    net.partial_fit(*data())
    other.partial_fit(*data())
    assert equal(other.module_, list(net.module_.parameters()))
    assert other.optimizer_.steps == 2 * BATCHES


def test_parameters_can_be_set() -> None:
    net = make().fit(*data())
    net.set_params(lr=0.5, optimizer__momentum=0.0)
    (group,) = net.optimizer_.inner.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.0)
    first = net.optimizer_
    net.set_params(criterion__label_smoothing=0.1)  # makes a new criterion and a new optimizer
    assert isinstance(net.optimizer_, IRWOptimizer)
    assert net.optimizer_ is not first
    net.partial_fit(*data())
    assert (first.steps, net.optimizer_.steps) == (BATCHES, BATCHES)


def test_model_selection() -> None:
    search = GridSearchCV(make(), {"lr": [0.01, 0.1]}, cv=2, refit=True)
    x, y = data()
    search.fit(x, y)
    assert isinstance(search.best_estimator_.optimizer_, IRWOptimizer)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert not hasattr(clone(search.best_estimator_), "optimizer_")
