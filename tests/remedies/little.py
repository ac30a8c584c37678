"""Little data, and comparisons on it that take a second."""

from __future__ import annotations

import warnings

import numpy as np
from torch import nn

from irw_optim import compare_remedies

FEATURES = 4


def people(number=200, seed=0):
    """A rare class, and a minority of it (x[:, 1] > 0) on the other side of the boundary."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, FEATURES)).astype(np.float32)
    y = (rng.random(number) < 0.25).astype(np.int64)
    x[:, 1] = 3 * np.sign(x[:, 1])
    x[:, 0] += np.where(y == 1, 2, -1) * np.where((x[:, 1] > 0) & (y == 1), -0.2, 1)
    return x, y


def linear(outputs=2):
    return lambda: nn.Linear(FEATURES, outputs)


SMALL = {"seeds": 2, "epochs": 1, "batch_size": 50, "progress": False}


def compare(train=None, validation=None, model=None, criterion=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of clusters
        return compare_remedies(
            model or linear(),
            criterion or nn.CrossEntropyLoss(),
            people() if train is None else train,
            people(seed=1) if validation is None else validation,
            **{**SMALL, **options},
        )
