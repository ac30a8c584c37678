"""Data of any form goes in, or is refused by name before anything trains."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from little import compare, linear, people
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from irw_optim import PerSampleLoss
from irw_optim.remedies import REMEDIES, compare_remedies

for library in ("fairlearn", "jinja2", "matplotlib", "tqdm"):
    pytest.importorskip(library, reason="remedies need the report extra")
pd = pytest.importorskip("pandas", reason="remedies need the report extra")


class Rows(Dataset):
    def __init__(self, pairs, kind=tuple):
        self.pairs, self.kind = list(zip(*pairs, strict=True)), kind

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        x, y = self.pairs[index]
        return {"x": x, "y": y} if self.kind is dict else (x, int(y))


def as_frame(pair):
    return pd.DataFrame(pair[0].astype(np.float64)), pd.Series(pair[1], index=range(9, 209))


FORMS = {
    "tensors": lambda pair: tuple(torch.from_numpy(part) for part in pair),
    "lists": lambda pair: (pair[0].tolist(), pair[1].tolist()),
    "pandas": as_frame,
    "float labels": lambda pair: (pair[0], pair[1].astype(float)),
    "a column of labels": lambda pair: (pair[0], pair[1][:, None]),
    "a data set": Rows,
    "a TensorDataset": lambda pair: TensorDataset(*map(torch.from_numpy, pair)),
}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Untouched(torch.optim.SGD):
    def step(self, closure=None):
        pytest.fail("it trains")


SHARED = nn.Linear(4, 2)

BAD = {
    "names as labels": ({"train": (people()[0], ["a", "b"] * 100)}, "LabelEncoder"),
    "a gap": ({"train": (np.full((200, 4), np.nan), people()[1])}, r"train X\[0\] has NaN"),
    "lengths": ({"train": (people()[0], people()[1][:9])}, "X has 200 samples and train y has 9"),
    "categories": ({"train": (np.full((200, 4), "a"), people()[1])}, "encode categories"),
    "fractions": ({"train": (people()[0], people()[1] / 2)}, "train y"),
    "three": ({"validation": (*people(), 1)}, "validation is a tuple of 3"),
    "empty": ({"validation": (people()[0][:0], people()[1][:0])}, "empty"),
    "one class": ({"train": (people()[0], people()[1] * 0)}, "train has a single class"),
    "one class to judge by": (
        {"validation": (people()[0], people()[1] * 0), "groups": people()[1]},
        "validation has a single class",
    ),
    "a class too many": ({"train": (people()[0], people()[1] + 5)}, "do not take a batch"),
    "width": ({"validation": (people()[0][:, :2], people()[1])}, "validation: model and"),
    "groups": ({"groups": ["a"]}, "groups.* has 1: expected the same"),
    "clusters": ({"clusters": [1]}, "clusters has 1: expected the same"),
    "cells": ({"min_cell": 999}, "min_cell=999"),
    "remedies": ({"remedies": ["plane"]}, "'plane' is none"),
    "seeds": ({"seeds": 0}, "seeds=0"),
    "no seeds": ({"seeds": 2.5}, "seeds=2.5"),
    "a seed twice": ({"seeds": [3, 5, 3]}, r"seeds=\[3, 5, 3\]: expected .* different"),
    "schedule": ({"scheduler": "cosine"}, "scheduler='cosine'"),
    "no schedule": ({"scheduler": lambda optimizer, steps: 3}, "scheduler=.*no attribute 'step'"),
    "a schedule of one": ({"scheduler": lambda optimizer: None}, "scheduler=.*optimizer and steps"),
    "epochs": ({"epochs": 0}, "epochs=0"),
    "alpha": ({"alpha": 2}, "alpha=2"),
    "stream": ({"train": Stream()}, "train is a Stream"),
    "remedy": ({"remedies": {"mine": 1}}, "remedies\\['mine'\\]=1"),
    "the oracle's name": (
        {"remedies": {"groups known (oracle)": REMEDIES["plain"]}},
        "a name other than 'groups known",
    ),
    "options": ({"loader_options": {"nope": 1}}, r"loader_options=\{'nope': 1\}.*'nope'"),
    "no options": ({"loader_options": 3}, "loader_options=3"),
    "optimizer": ({"optimizer": "adam"}, "optimizer='adam'"),
    "an optimizer that asks for a closure": (
        {"optimizer": torch.optim.LBFGS},
        "optimizer=.*'closure'.*functools.partial",
    ),
    "a schedule that asks for a metric": (
        {"scheduler": lambda optimizer, _: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)},
        "scheduler=.*'metrics'.*optimizer and steps",
    ),
    "another's optimizer": (
        {"optimizer": lambda _: torch.optim.SGD(SHARED.parameters(), lr=0.1)},
        "2 parameters that are not the model's",
    ),
    "model": ({"model": lambda: 3}, "make_model\\(\\) gave 3"),
    "the same model": ({"model": lambda: SHARED}, "the same parameters twice: expected new ones"),
    "a shared body": (
        {"model": lambda: nn.Sequential(SHARED, nn.Linear(2, 2))},
        "the same parameters twice",
    ),
    "criterion": ({"criterion": nn.CrossEntropyLoss(reduction="none")}, "reduction"),
    "regression": (
        {"train": (people()[0], people()[1]), "criterion": nn.MSELoss(), "model": linear(1)},
        "no class a sample|do not take",
    ),
}


NAMES = ("class-balanced", "two stages, by losses", "IRW")


@pytest.fixture(scope="module")
def expected():
    return compare(remedies=NAMES).predictions


class TestInput:
    @pytest.mark.parametrize("form", FORMS)
    def test_the_same_people_in_other_forms(self, expected, form):
        change = FORMS[form]
        found = compare(change(people()), change(people(seed=1)), remedies=NAMES).predictions
        for name in NAMES:
            assert (found[name] == expected[name]).mean() > 0.99

    @pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
    def test_groups_whatever_torchs_default_dtype_is(self, default):
        groups, before = np.arange(200) % 2, torch.get_default_dtype()
        model = lambda: linear()().float()  # noqa: E731
        expected = compare(model=model, groups=groups, remedies=["moved threshold"])
        torch.set_default_dtype(default)
        try:
            found = compare(model=model, groups=groups, remedies=["moved threshold"])
        finally:
            torch.set_default_dtype(before)
        oracle = "groups known (oracle)"
        assert found.predictions[oracle].shape == expected.predictions[oracle].shape

    def test_arrays_that_nobody_may_write_to(self):
        train, validation = people(), people(seed=1)
        for part in (*train, *validation):
            part.flags.writeable = False
        criterion, torchs = nn.CrossEntropyLoss(), torch.set_warn_always
        torchs(True)  # once a process otherwise, and it would be over
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                compare_remedies(linear(), criterion, train, validation, seeds=1, epochs=1)
        finally:
            torchs(False)
        assert not [w for w in told if "writable" in str(w.message)]

    def test_batches_that_are_dicts(self, expected):
        train, validation = (Rows(people(seed=s), dict) for s in (0, 1))
        found = compare(
            *(train, validation),
            remedies=NAMES,
            clusters=np.arange(200) % 3,
            forward=lambda model, batch: (model(batch["x"]), batch["y"]),
        ).predictions
        for name in NAMES:
            assert (found[name] == expected[name]).mean() > 0.99

    @pytest.mark.parametrize("form", FORMS)
    def test_one_output_for_two_classes(self, form):
        if "set" in form.lower():
            pytest.skip("a data set's target is as the criterion takes it")
        change = FORMS[form]
        found = compare(
            *(change(people()), change(people(seed=1)), linear(1), nn.BCEWithLogitsLoss()),
            remedies=["moved threshold"],
        )
        assert found.table.loc["plain", "accuracy"] > 0.3

    def test_class_numbers_that_nobody_has(self):
        (x, y), (xv, yv) = people(), people(seed=1)
        found = compare((x, 2 * y), (xv, 2 * yv), linear(4))
        assert set(np.unique(found.predictions["moved threshold"])) <= {0, 2}

    def test_a_criterion_of_ones_own(self, expected):
        def loss(output, target):
            return nn.functional.cross_entropy(output, target, reduction="none")

        found = compare(criterion=PerSampleLoss(loss), remedies=NAMES).predictions
        for name in NAMES:
            assert (found[name] == expected[name]).mean() > 0.99

    @pytest.mark.parametrize("case", BAD)
    def test_bad_input_is_named_before_anything_trains(self, case):
        change, named = BAD[case]

        with pytest.raises((TypeError, ValueError), match=named):
            compare(**{"optimizer": Untouched, **change})

    def test_a_method_of_ones_own_that_gives_no_model(self):
        with pytest.raises(TypeError, match=r"remedies\['mine'\] gave None: expected a model"):
            compare(remedies={"mine": lambda training: None})

    def test_ones_own_method_beside_the_others(self):
        def focal(training):
            assert training.labels.tolist() == people()[1].tolist()
            return training.fit(objective=lambda losses, labels: (losses**2).mean())

        found = compare(remedies={**REMEDIES, "focal": focal})
        assert list(found.predictions)[-1] == "focal"
        assert re.search(r"^focal ", str(found), re.MULTILINE)
