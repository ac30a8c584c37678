"""The estimators: the step is IRWOptimizer's, the rest is as scikit-learn has it."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn

from irw_optim import DBSCANFilter, IRWOptimizer, PerSampleLoss

skorch = pytest.importorskip("skorch")
from irw_optim.sklearn import IRWClassifier, IRWRegressor, mlp  # noqa: E402

FEATURES, CLASSES, SIZE, BATCH = 5, 3, 40, 8


def data(classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.RandomState(0)
    return draw.randn(SIZE, FEATURES).astype(np.float32), np.arange(SIZE) % classes


def network(outputs: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, outputs))


def small(kind: type = IRWClassifier, **options: Any) -> Any:
    return kind(**{"max_epochs": 2, "batch_size": BATCH, "random_state": 0, **options})


def loop(
    model: nn.Module, criterion: nn.Module, x: Any, y: Any, epochs: int = 2, **options: Any
) -> tuple[list[torch.Tensor], IRWOptimizer]:
    """What the estimator must do, written down: batches in their order, Adam, IRW."""
    inner = torch.optim.Adam(model.parameters(), lr=0.001)
    optimizer = IRWOptimizer(
        inner, **{"alpha": 0.3, "model": model, "criterion": criterion, **options}
    )
    for _ in range(epochs):
        for rows, labels in zip(
            torch.as_tensor(x).split(BATCH), torch.as_tensor(y).split(BATCH), strict=True
        ):
            optimizer.zero_grad()
            criterion(model(rows), labels).backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizer


def parameters(estimator: Any) -> list[torch.Tensor]:
    return list(estimator.net_.module_.parameters())


def same(estimator: Any, expected: Any) -> bool:
    return all(map(torch.equal, parameters(estimator), expected))


IN_ORDER = {"iterator_train__shuffle": False}


class TestFloat64:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (IRWClassifier, {}),
            (
                IRWClassifier,
                {"class_weight": "balanced", "train_split": skorch.dataset.ValidSplit(2)},
            ),
            (IRWClassifier, {"module": network().double(), "class_weight": "balanced"}),
            (IRWRegressor, {}),
            (IRWRegressor, {"criterion": nn.HuberLoss}),
        ],
    )
    def test_modules_in_float64_get_rows_and_targets_of_their_own(self, kind, options):
        x, y = data()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            wide = small(kind, **options).fit(x, y)
        finally:
            torch.set_default_dtype(before)
        assert {p.dtype for p in parameters(wide)} == {torch.float64}
        narrow = copy.deepcopy(wide)
        narrow.net_.module_.float()
        np.testing.assert_allclose(wide.predict(x), narrow.predict(x), rtol=1e-4, atol=1e-5)
        wide.partial_fit(x, y)


class TestTheStep:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"alpha": 0.6},
            {"outliers": DBSCANFilter()},
            {"center": 1.0},
            {"mix": 0.5},
            {"class_balance": True},
            {"warmup_steps": 3},
            {"score_parameters": "last"},
            {"weighting": "cvar"},
            {"engine": "autodiff"},
        ],
        ids=repr,
    )
    def test_of_the_classifier_is_that_of_the_optimizer(self, options):
        x, y = data()
        expected, optimizer = loop(network(), nn.CrossEntropyLoss(), x, y, **options)
        fitted = small(module=network(), **options, **IN_ORDER).fit(x, y)
        assert same(fitted, expected)
        assert isinstance(fitted.net_.optimizer_, IRWOptimizer)
        assert fitted.net_.optimizer_.state_dict()["irw"] == optimizer.state_dict()["irw"]

    def test_it_is_not_plain_training(self):
        x, y = data()
        plain, _ = loop(network(), nn.CrossEntropyLoss(), x, y, weighting="uniform")
        assert not same(small(module=network(), **IN_ORDER).fit(x, y), plain)

    def test_of_the_regressor_is_that_of_the_optimizer(self):
        x, _ = data()
        y = x @ np.arange(FEATURES, dtype=np.float32)
        expected, _ = loop(network(1), nn.MSELoss(), x, y[:, None])
        assert same(small(IRWRegressor, module=network(1), **IN_ORDER).fit(x, y), expected)

    def test_with_class_weights(self):
        x, y = data()
        weight = torch.tensor([1.0, 2.0, 0.5])
        expected, _ = loop(network(), nn.CrossEntropyLoss(weight=weight), x, y)
        labels = np.array(["a", "b", "c"])[y]
        weights = {"a": 1.0, "b": 2.0, "c": 0.5}
        fitted = small(module=network(), class_weight=weights, **IN_ORDER).fit(x, labels)
        assert same(fitted, expected)

    def test_balanced_weights_are_scikit_learns(self):
        x, y = data()
        y = np.where(y == 2, 1, y)
        fitted = small(class_weight="balanced").fit(x, y)
        expected = SIZE / (2 * np.bincount(y))
        np.testing.assert_allclose(fitted.net_.criterion_.weight, expected, rtol=1e-6)

    def test_shuffled_batches_hold_every_row_once_and_the_step_is_the_same(self):
        seen: list[Any] = []

        class Recorder(skorch.callbacks.Callback):
            def on_batch_begin(self, net, batch=None, training=False, **kwargs):
                seen.append(batch)

        x, y = data()
        fitted = small(module=network(), max_epochs=1, callbacks=[Recorder()]).fit(x, y)
        rows, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        assert not torch.equal(rows, torch.as_tensor(x))
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, x.tolist()))
        assert same(fitted, loop(network(), nn.CrossEntropyLoss(), rows, labels, epochs=1)[0])

    def test_sparse_rows_are_the_same_rows(self):
        x, y = data()
        x[x < 0.5] = 0
        dense = small().fit(x, y)
        for kind in (sparse.csr_matrix, sparse.csr_array, sparse.coo_matrix, sparse.csc_array):
            fitted = small().fit(kind(x), y)
            assert same(fitted, parameters(dense))
            np.testing.assert_array_equal(fitted.predict_proba(kind(x)), dense.predict_proba(x))


class TestRandomness:
    def test_a_seed_decides_everything(self):
        x, y = data()
        first = small(module__dropout=0.5).fit(x, y)
        torch.manual_seed(99)
        np.random.seed(99)
        assert same(small(module__dropout=0.5).fit(x, y), parameters(first))
        assert not same(small(module__dropout=0.5, random_state=1).fit(x, y), parameters(first))

    def test_none_is_numpys_global_state(self):
        x, y = data()
        fits = []
        for seed in (5, 5, 6):
            np.random.seed(seed)
            fits.append(small(random_state=None).fit(x, y))
        assert same(fits[0], parameters(fits[1]))
        assert not same(fits[0], parameters(fits[2]))

    def test_an_instance_is_drawn_from(self):
        x, y = data()
        state = np.random.RandomState(0)
        first, second = (small(random_state=state).fit(x, y) for _ in range(2))
        assert not same(first, parameters(second))

    def test_torch_goes_on_as_if_nothing_had_been_drawn(self):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        small().fit(*data()).partial_fit(*data())
        assert torch.equal(torch.rand(3), expected)

    def test_every_fit_begins_anew_and_leaves_the_given_module_alone(self):
        x, y = data()
        module = network()
        estimator = small(module=module)
        first = [p.clone() for p in parameters(estimator.fit(x, y))]
        assert same(estimator.fit(x, y), first)
        assert all(map(torch.equal, module.parameters(), network().parameters()))
        assert estimator.module is module

    def test_partial_fit_goes_on(self):
        x, y = data()
        expected, _ = loop(network(), nn.CrossEntropyLoss(), x, y, epochs=3)
        estimator = small(module=network(), **IN_ORDER).fit(x, y).partial_fit(x, y)
        assert same(estimator, expected)
        begun = small(module=network(), **IN_ORDER).partial_fit(x[:9], y[:9], classes=[0, 1, 2])
        assert same(begun, loop(network(), nn.CrossEntropyLoss(), x[:9], y[:9], epochs=1)[0])

    def test_the_regressor_goes_on_too(self):
        x, _ = data()
        y = x.sum(1)
        expected, _ = loop(network(1), nn.MSELoss(), x, y[:, None], epochs=2)
        estimator = small(IRWRegressor, module=network(1), **IN_ORDER)
        assert same(estimator.partial_fit(x, y).partial_fit(x, y), expected)


class TestPredictions:
    def test_labels_are_those_that_were_given(self):
        x, y = data()
        labels = np.array(["no", "maybe", "yes"])[y]
        fitted = small().fit(x, labels)
        assert fitted.classes_.tolist() == ["maybe", "no", "yes"]
        assert same(fitted, parameters(small().fit(x, np.array([1, 0, 2])[y])))
        likeliest = fitted.predict_proba(x).argmax(1)
        assert (fitted.predict(x) == fitted.classes_[likeliest]).all()

    def test_probabilities_are_the_softmax_of_the_module_in_double(self):
        x, y = data()
        fitted = small(module__dropout=0.5).fit(x, y)
        probabilities = fitted.predict_proba(x)
        with torch.no_grad():
            expected = fitted.net_.module_.eval()(torch.as_tensor(x)).double().softmax(1)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-14)
        assert np.isfinite(log_loss(y, probabilities))  # which warns where they do not sum to 1

    def test_a_threshold_counts_at_once(self):
        x, y = data(classes=2)
        fitted = small().fit(x, y)
        second = fitted.predict_proba(x)[:, 1]
        middle = float(np.sort(second)[SIZE // 2])
        for threshold in (0.0, middle, 1.0):
            predicted = fitted.set_params(threshold=threshold).predict(x)
            np.testing.assert_array_equal(predicted, second >= threshold)
        for threshold in (1.5, float("nan"), "0.3", True):
            with pytest.raises(ValueError, match=r"with 2 classes: expected None.* in \[0, 1\]"):
                fitted.set_params(threshold=threshold).predict(x)

    def test_a_criterion_on_log_probabilities(self):
        x, y = data()

        def module() -> nn.Module:
            return nn.Sequential(network(), nn.Softmax(1))  # skorch takes the logarithm

        fitted = small(module=module(), criterion=nn.NLLLoss, **IN_ORDER).fit(x, y)
        expected, _ = loop(network(), nn.CrossEntropyLoss(), x, y)
        for p, q in zip(parameters(fitted), expected, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-3, atol=1e-4)

    def test_a_function_as_criterion(self):
        x, y = data()
        criterion = PerSampleLoss(_losses)
        fitted = small(
            module=network(), criterion=criterion, predict_nonlinearity=_softmax, **IN_ORDER
        ).fit(x, y)
        assert same(fitted, loop(network(), PerSampleLoss(_losses), x, y)[0])
        assert fitted.predict_proba(x).shape == (SIZE, CLASSES)

    def test_scores_that_are_no_probabilities(self):
        x, y = data()
        fitted = small(criterion=nn.MultiMarginLoss).fit(x, y)
        assert set(fitted.predict(x)) <= {0, 1, 2}
        with pytest.raises(ValueError, match=r"predict_nonlinearity='auto'.*MultiMarginLoss"):
            fitted.predict_proba(x)
        softmax = small(criterion=nn.MultiMarginLoss, predict_nonlinearity=_softmax).fit(x, y)
        assert (softmax.predict_proba(x).argmax(1) == fitted.predict(x)).all()

    def test_images_for_a_module_of_ones_own(self):
        images = np.random.RandomState(0).randn(SIZE, 1, 6, 6)

        def convolutions(n_outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, n_outputs)
            )

        fitted = small(module=convolutions).fit(images, data()[1])
        assert fitted.predict_proba(images).shape == (SIZE, CLASSES)


def _losses(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(scores, labels, reduction="none")


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(1)


class TestInScikitLearn:
    def test_grid_search_over_arguments_with_and_without_prefix(self):
        grid = {
            "irwclassifier__alpha": [0.2, 0.5],
            "irwclassifier__module__hidden_layer_sizes": [(4,), (8, 8)],
            "irwclassifier__optimizer__weight_decay": [0.01],
        }
        search = GridSearchCV(make_pipeline(StandardScaler(), small()), grid, cv=2).fit(*data())
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()
        best = search.best_estimator_[-1]
        wanted = {name.partition("__")[2]: v for name, v in search.best_params_.items()}
        assert best.get_params().items() >= wanted.items()
        assert best.net_.module_[0].out_features == wanted["module__hidden_layer_sizes"][0]
        assert best.net_.optimizer_.inner.param_groups[0]["weight_decay"] == 0.01
        assert best.net_.optimizer_.state_dict()["irw"]["alpha"] == wanted["alpha"]

    def test_clones_have_every_argument_and_nothing_that_was_fitted(self):
        fitted = small(alpha=0.4, module__dropout=0.25, optimizer__amsgrad=True).fit(*data())
        twin = clone(fitted)
        assert twin.get_params() == fitted.get_params()
        assert twin.get_params()["module__dropout"] == 0.25
        assert not hasattr(twin, "net_")
        assert "module__dropout=0.25" in repr(twin)

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))],
        ids=["copy", "pickle"],
    )
    def test_copies_predict_the_same_and_train_on_by_themselves(self, duplicate):
        x, y = data()
        fitted = small().fit(x, y)
        twin = duplicate(fitted)
        np.testing.assert_array_equal(twin.predict_proba(x), fitted.predict_proba(x))
        before = [p.clone() for p in parameters(twin)]
        fitted.partial_fit(x, y)
        assert same(twin, before)
        assert same(twin.partial_fit(x, y), parameters(fitted))

    def test_frames_with_sparse_categories(self):
        pd = pytest.importorskip("pandas")
        x, y = data()
        towns = np.array([f"town {i % 13}" for i in range(SIZE)])
        frame = pd.DataFrame({"age": x[:, 0], "town": towns})
        columns = ColumnTransformer(
            [("number", StandardScaler(), ["age"]), ("town", OneHotEncoder(), ["town"])],
            sparse_threshold=1.0,
        )
        model = make_pipeline(columns, small()).fit(frame, y)
        assert sparse.issparse(model[0].transform(frame))
        assert model[-1].n_features_in_ == 14
        assert model.predict(frame).shape == (SIZE,)
        assert np.isfinite(cross_val_score(model, frame, y, cv=2)).all()

    def test_names_of_columns_are_kept_and_compared(self):
        pd = pytest.importorskip("pandas")
        x, y = data()
        frame = pd.DataFrame(x, columns=list("abcde"))
        fitted = small().fit(frame, y)
        assert fitted.feature_names_in_.tolist() == list("abcde")
        with pytest.raises(ValueError, match="feature names"):
            fitted.predict(frame[list("edcba")])

    def test_fairlearn_measures_it_and_moves_its_threshold(self):
        metrics = pytest.importorskip("fairlearn.metrics")
        post = pytest.importorskip("fairlearn.postprocessing")
        x, y = data(classes=2)
        group = np.arange(SIZE) // 4 % 2
        fitted = small().fit(x, y)
        frame = metrics.MetricFrame(
            metrics=metrics.selection_rate,
            y_true=y,
            y_pred=fitted.predict(x),
            sensitive_features=group,
        )
        assert set(frame.by_group.index) == {0, 1}
        for prefit in (True, False):
            moved = post.ThresholdOptimizer(
                estimator=fitted if prefit else clone(fitted),
                constraints="demographic_parity",
                prefit=prefit,
                predict_method="predict_proba",
            ).fit(x, y, sensitive_features=group)
            predicted = moved.predict(x, sensitive_features=group, random_state=0)
            assert set(predicted) <= {0, 1}

    def test_a_split_for_early_stopping(self):
        from skorch.callbacks import EarlyStopping
        from skorch.dataset import ValidSplit

        stopping = EarlyStopping(patience=1, threshold=10.0)
        split = ValidSplit(4, stratified=True)
        fitted = small(max_epochs=50, callbacks=[stopping], train_split=split).fit(*data())
        assert len(fitted.net_.history) < 50
        assert "valid_acc" in fitted.net_.history[-1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"alpha": 2}, ValueError, r"alpha=2: expected a number in \(0, 1\]"),
            ({"max_epochs": 0}, ValueError, r"max_epochs=0: expected a whole number >= 1"),
            ({"threshold": 0.3}, ValueError, r"threshold=0\.3 with 3 classes: expected None"),
            ({"threshold": 3}, ValueError, r"threshold=3 with .* or for two a probability"),
            (
                {"module": network(2)},
                ValueError,
                r"shape \(1, 2\): expected \(1, 3\), one for each class of y.*Linear\(\.\.\., 3\)",
            ),
            (
                {"module": network(), "module__dropout": 0.1},
                TypeError,
                r"Sequential that is made already, so .*module__dropout.*module=Sequential",
            ),
            (
                {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)},
                TypeError,
                r"optimizer is of the type SGD: expected a class such as torch\.optim\.SGD",
            ),
            (
                {"class_weight": "balanced", "criterion": nn.CrossEntropyLoss()},
                TypeError,
                r"class_weight='balanced' goes to the criterion as weight=: expected criterion=",
            ),
            (
                {"criterion": nn.functional.cross_entropy},
                TypeError,
                r"criterion=.*cross_entropy.*'input'.*criterion=irw_optim\.PerSampleLoss",
            ),
            ({"module": nn.Linear}, TypeError, r"module=.*'in_features'.*module__"),
            ({"module": 3}, TypeError, r"module=3.*class of a torch\.nn\.Module"),
            (
                {"class_weight": "balanced", "criterion__weight": torch.ones(3)},
                TypeError,
                r"multiple values.*criterion__weight",
            ),
        ],
    )
    def test_arguments_that_are_impossible(self, options, kind, message):
        estimator = small().fit(*data())
        estimator.set_params(**options)
        with pytest.raises(kind, match=message):
            estimator.fit(*data())

    def test_a_fit_that_fails_leaves_nothing_that_predicts(self):
        estimator = small().fit(*data())
        with pytest.raises(ValueError, match="alpha=2"):
            estimator.set_params(alpha=2).fit(*data())
        with pytest.raises(NotFittedError):
            estimator.predict(data()[0])

    def test_outputs_of_a_regression_are_not_broadcast(self):
        flat = nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0))
        x, _ = data()
        with pytest.raises(ValueError, match=r"shape \(1,\): expected \(1, 1\), one number a row"):
            small(IRWRegressor, module=flat).fit(x, x[:, 0])

    def test_unknown_arguments(self):
        with pytest.raises(TypeError, match=r"no argument 'alhpa': expected one of alpha"):
            IRWClassifier(alhpa=0.3)
        with pytest.raises(ValueError, match="alhpa"):
            IRWClassifier().set_params(alhpa=0.3)
        with pytest.raises(TypeError, match="width"):
            small(module__width=3).fit(*data())

    @pytest.mark.parametrize("kind", [IRWClassifier, IRWRegressor])
    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_sample_weights(self, kind, method):
        x, y = data()
        with pytest.raises(TypeError, match=r"sample_weight is not taken.*class_weight="):
            getattr(kind(), method)(x, y, sample_weight=np.ones(SIZE))
        told = {"classes": [0, 1, 2]} if (kind, method) == (IRWClassifier, "partial_fit") else {}
        getattr(small(kind), method)(x, y, **told, sample_weight=None)  # as scikit-learn's own do
        with pytest.raises(TypeError, match="unexpected keyword argument 'groups'"):
            getattr(kind(), method)(x, y, groups=y)

    def test_labels_that_partial_fit_was_not_told(self):
        x, y = data()
        with pytest.raises(ValueError, match=r"classes=None.*partial_fit\(X, y, classes="):
            small().partial_fit(x, y)
        with pytest.raises(ValueError, match=r"not among classes: \[2\]"):
            small().partial_fit(x, y, classes=[0, 1])
        with pytest.raises(ValueError, match=r"class_weight='balanced' needs all data at once"):
            small(class_weight="balanced").partial_fit(x, y, classes=[0, 1, 2])

    def test_a_first_call_that_is_refused_begins_nothing(self):
        x, y = data()
        estimator = small(module=network(), **IN_ORDER)
        with pytest.raises(ValueError, match=r"not among classes: \[2\]"):
            estimator.partial_fit(x, y, classes=[0, 1])
        assert not hasattr(estimator, "net_")
        assert not hasattr(estimator, "classes_")
        estimator.partial_fit(x, y, classes=[0, 1, 2])
        assert same(estimator, loop(network(), nn.CrossEntropyLoss(), x, y, epochs=1)[0])

    def test_other_classes_in_a_later_call(self):
        x, y = data()
        estimator = small().partial_fit(x, y, classes=[0, 1, 2])
        before = [p.clone() for p in parameters(estimator)]
        with pytest.raises(ValueError, match=r"expected those of the first call, \[0, 1, 2\]"):
            estimator.partial_fit(x, y, classes=[0, 1, 2, 3])
        assert same(estimator, before)
        estimator.partial_fit(x, y, classes=[2, 1, 0])

    @pytest.mark.parametrize("method", ["fit", "partial_fit"])
    def test_a_training_that_raises_leaves_no_net(self, method):
        x, y = data()
        estimator = small().fit(x, y)
        if method == "partial_fit":
            del estimator.net_
        estimator.set_params(class_weight={0: math.nan, 1: 1.0, 2: 1.0})
        more = {"classes": [0, 1, 2]} if method == "partial_fit" else {}
        with pytest.raises(FloatingPointError):
            getattr(estimator, method)(x, y, **more)
        with pytest.raises(NotFittedError):
            estimator.predict(x)


def test_the_default_module() -> None:
    shapes = [tuple(p.shape) for p in mlp(7, 2, hidden_layer_sizes=()).parameters()]
    assert shapes == [(2, 7), (2,)]
    assert [type(m) for m in mlp(7, 2, (3,), dropout=0.5)][2] is nn.Dropout


def test_without_skorch_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['skorch'] = None; import irw_optim\n"
        "try: import irw_optim.sklearn\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == (
        'irw_optim.sklearn needs skorch: pip install "irw-optim[sklearn]"'
    )
