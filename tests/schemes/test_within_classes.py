"""Weights of each class by itself against a loop over the classes, and the draws made of them."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import reference
import torch
from models import mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from irw_optim import PerSampleLoss
from irw_optim.schemes import ClassByClassSampler, ResamplingSampler, global_weights

N, FEATURES = 61, 4
LABELS = torch.tensor([0, 0, 0, 2, 3])[torch.arange(N) % 5]  # nobody is of class 1
TOLERANCE = 1e-10


def model_of(outputs=4):
    torch.manual_seed(1)
    return mlp(FEATURES, 6, outputs).double()


def inputs():
    torch.manual_seed(0)
    return torch.randn(N, FEATURES, dtype=torch.float64)


@pytest.fixture
def data():
    return TensorDataset(inputs(), LABELS)


def loader_of(data, **options):
    return DataLoader(data, batch_size=16, shuffle=True, **options)


def class_by_class(model, data, alpha, labels=LABELS, **options):
    """The oracle: plain autograd over the samples of one class, then of the next."""
    weights = torch.zeros(N, dtype=torch.float64)
    for label in labels.unique():
        own = labels == label
        losses = F.cross_entropy(model(data.tensors[0][own]), LABELS[own], reduction="none")
        weights[own] = reference.step(losses, list(model.parameters()), alpha, **options).weights
    return weights / len(labels.unique())


def quietly(*arguments, **options):
    """A sampler whose weights may rest on few."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ClassByClassSampler(*arguments, progress=False, **options)


CRITERION = nn.CrossEntropyLoss()


class TestWithinClasses:
    @pytest.mark.parametrize("options", [{}, {"mix": 0.5}, {"center": 1.0}])
    def test_equal_to_a_loop_over_the_classes(self, data, options):
        model = model_of()
        found = global_weights(
            model, CRITERION, loader_of(data), 0.3, progress=False, within_classes=True, **options
        )
        expected = class_by_class(model, data, 0.3, **options)
        assert reference.error(found, expected) < TOLERANCE

    def test_equal_to_weights_of_the_parts(self, data):
        model, weights = model_of(), torch.zeros(N, dtype=torch.float64)
        for label in LABELS.unique():
            own = (label == LABELS).nonzero().squeeze(1)
            part = loader_of(Subset(data, own.tolist()))
            weights[own] = global_weights(model, CRITERION, part, 0.5, mix=0.5, progress=False) / 3
        sampler = quietly(model, CRITERION, loader_of(data))
        assert reference.error(sampler.weights.to(LABELS.device), weights) < TOLERANCE

    def test_other_classes_than_the_targets(self, data):
        model, sexes = model_of(), np.where(np.arange(N) % 3 == 0, "f", "m")
        found = global_weights(
            *(model, CRITERION, loader_of(data), 0.3),
            progress=False,
            within_classes=True,
            labels=sexes,
        )
        codes = torch.tensor((sexes == "m").astype(int))
        assert reference.error(found, class_by_class(model, data, 0.3, codes)) < TOLERANCE

    def test_a_filter_that_would_leave_nobody_of_a_class(self, data):
        removed = LABELS == 2
        removed[:20] = True
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        weights = global_weights(
            *(model_of(), CRITERION, loader_of(data), 0.3),
            outliers=lambda gram: removed[order],
            progress=False,
            within_classes=True,
        )
        assert not weights[removed & (LABELS != 2)].any()
        for label in (0, 2, 3):
            assert weights[label == LABELS].sum().item() == pytest.approx(1 / 3)

    def test_ignored_samples_are_of_no_class(self, data):
        labels = LABELS.clone()
        labels[:7] = -100
        loader = loader_of(TensorDataset(data.tensors[0], labels))
        sampler = quietly(model_of(), CRITERION, loader)
        assert [(one.label, one.samples) for one in sampler.classes] == [
            (label, int((labels == label).sum())) for label in (0, 2, 3)
        ]
        assert not sampler.weights[:7].any()

    def test_a_class_that_is_ignored_as_a_whole_is_none(self, data):
        targets, sexes = LABELS.clone(), np.where(np.arange(N) % 3 == 0, "f", "m")
        targets[torch.tensor(sexes == "f")] = -100
        loader = loader_of(TensorDataset(data.tensors[0], targets))
        sampler = quietly(model_of(), CRITERION, loader, labels=sexes)
        assert [one.label for one in sampler.classes] == ["m"]
        assert not sampler.weights.numpy()[sexes == "f"].any()

    @pytest.mark.parametrize("labels", [None, LABELS], ids=["targets", "labels"])
    def test_nobody_with_a_target_is_refused(self, data, labels):
        loader = loader_of(TensorDataset(data.tensors[0], torch.full((N,), -100)))
        with pytest.raises(ValueError, match="all targets are ignored"):
            quietly(model_of(), CRITERION, loader, labels=labels)

    def test_labels_without_within_classes_are_refused(self, data):
        with pytest.raises(ValueError, match="within_classes=True"):
            global_weights(model_of(), CRITERION, loader_of(data), 0.3, labels=LABELS)


class TestSampler:
    def test_by_losses_equals_the_formula(self, data):
        model, expected = model_of(), torch.zeros(N, dtype=torch.float64)
        losses = F.cross_entropy(model(data.tensors[0]), LABELS, reduction="none").detach()
        for label in LABELS.unique():
            own = label == LABELS
            expected[own] = (0.7 * losses[own] / losses[own].sum() + 0.3 / int(own.sum())) / 3
        sampler = quietly(model, CRITERION, loader_of(data), by="losses", mix=0.3)
        assert reference.error(sampler.weights.to(LABELS.device), expected) < TOLERANCE
        assert isinstance(sampler, ResamplingSampler)
        assert len(list(DataLoader(data, batch_size=10, sampler=sampler))) == 7

    def test_class_weights_of_the_criterion_make_no_difference(self, data):
        weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 5.0, 0.1]).double())
        for by in ("losses", "gradients"):
            one, other = (
                quietly(model_of(), criterion, loader_of(data), by=by).weights
                for criterion in (CRITERION, weighted)
            )
            assert reference.error(one, other) < TOLERANCE

    @pytest.mark.parametrize("by", ["losses", "gradients"])
    def test_even_weights_where_a_class_has_no_loss(self, data, by):
        def loss(output, target):
            return F.cross_entropy(output, target, reduction="none") * (target != 2)

        sampler = quietly(
            *(model_of(), PerSampleLoss(loss), loader_of(data)), by=by, labels=LABELS.tolist()
        )
        own = sampler.weights.to(LABELS.device)[LABELS == 2]
        torch.testing.assert_close(own, torch.full_like(own, 1 / 3 / len(own)))

    def test_effective_sizes_and_the_warning(self, data):
        sampler = quietly(model_of(), CRITERION, loader_of(data), mix=0.2)
        for label, samples, effective in sampler.classes:
            w = sampler.weights.to(LABELS.device)[label == LABELS]
            assert samples == len(w)
            assert effective == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))
        w = sampler.weights
        assert sampler.effective_share == pytest.approx(float(1 / (w**2).sum() / N))
        even = ClassByClassSampler(
            model_of(), CRITERION, loader_of(data), mix=1.0, progress=False
        )  # warns of nothing
        assert [one.effective_samples for one in even.classes] == pytest.approx(
            [one.samples for one in even.classes]
        )

        def one_error(output, target):
            return (torch.arange(len(target)) == 3) * output.square().sum(1)

        everybody = DataLoader(data, batch_size=N)
        with pytest.warns(UserWarning, match=r"1 of the 12 samples of class 2.* less than a third"):
            ClassByClassSampler(
                *(model_of(), PerSampleLoss(one_error), everybody),
                by="losses",
                mix=0.0,
                labels=LABELS,
                progress=False,
            )

    @pytest.mark.parametrize(
        "kind",
        [
            lambda label: label,  # Python's numbers, which torch collates
            np.int64,
            np.float32,
            float,
            lambda label: torch.tensor(float(label)),
        ],
    )
    def test_targets_of_any_kind_in_the_data_set(self, data, kind):
        pairs = [(x, kind(int(y))) for x, y in data]
        expected = quietly(model_of(), CRITERION, loader_of(data))
        found = quietly(model_of(), CRITERION, loader_of(pairs))
        assert reference.error(found.weights, expected.weights) < TOLERANCE
        for one, other in zip(found.classes, expected.classes, strict=True):
            assert tuple(one) == pytest.approx(tuple(other))

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_batches_whose_target_is_a_list_or_an_array(self, data, kind):
        def collate(pairs):
            return torch.stack([x for x, _ in pairs]), kind([int(y) for _, y in pairs])

        found = quietly(model_of(), CRITERION, loader_of(data, collate_fn=collate))
        expected = quietly(model_of(), CRITERION, loader_of(data))
        assert reference.error(found.weights, expected.weights) < TOLERANCE

    def test_batches_that_are_dicts(self, data):
        rows = [{"x": x, "y": y} for x, y in data]
        with pytest.raises(TypeError, match="forward=lambda model, batch"):
            quietly(model_of(), CRITERION, loader_of(rows))
        found = quietly(
            *(model_of(), CRITERION, loader_of(rows)),
            forward=lambda model, batch: (model(batch["x"]), batch["y"]),
        )
        expected = quietly(model_of(), CRITERION, loader_of(data))
        assert reference.error(found.weights, expected.weights) < TOLERANCE

    def test_two_classes_out_of_a_binary_target(self, data):
        rows = TensorDataset(data.tensors[0], (LABELS > 0).double()[:, None])
        sampler = quietly(model_of(1), nn.BCEWithLogitsLoss(), loader_of(rows))
        assert [one.label for one in sampler.classes] == [0, 1]

    @pytest.mark.parametrize(
        ("change", "error", "named"),
        [
            ({"by": "loss"}, ValueError, "by='loss'"),
            ({"alpha": 0}, ValueError, "alpha=0"),
            ({"mix": 2}, ValueError, "mix=2"),
            ({"labels": [0, 1]}, ValueError, "labels has 2 entries"),
            ({"labels": [0.5] * N}, ValueError, "labels"),
        ],
    )
    def test_arguments_that_do_not_fit(self, data, change, error, named):
        with pytest.raises(error, match=re.escape(named)):
            quietly(model_of(), CRITERION, loader_of(data), **change)

    @pytest.mark.parametrize(
        ("target", "error", "named"),
        [
            (0.5, ValueError, "the target 0.5: expected class numbers"),
            ("yes", TypeError, "LabelEncoder"),
        ],
    )
    def test_targets_that_are_refused(self, data, target, error, named):
        rows = [(x, target) for x, _ in data]
        with pytest.raises(error, match=named):
            quietly(model_of(), CRITERION, loader_of(rows))

    def test_a_target_without_classes(self, data):
        rows = TensorDataset(data.tensors[0], torch.randn(N, 4).double())
        with pytest.raises(ValueError, match="shows none: give labels="):
            quietly(model_of(), nn.MSELoss(), loader_of(rows))
