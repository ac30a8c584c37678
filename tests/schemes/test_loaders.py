"""Loaders that are made from the user's keep what was said of its workers."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from irw_optim.schemes.reading import DatasetReader, indexed_loader

SAID_OF_WORKERS = {
    "num_workers": 1,
    "timeout": 30,
    "worker_init_fn": print,
    "prefetch_factor": 3,
    "multiprocessing_context": "spawn",
}


def loader():
    return DataLoader(TensorDataset(torch.arange(9.0)), batch_size=4, **SAID_OF_WORKERS)


def read_by(given):
    return DatasetReader(given)._loader([[0, 1], [2]], default_collate)


@pytest.mark.parametrize("remade", [indexed_loader, read_by], ids=["in steps", "in a renewal"])
@pytest.mark.parametrize("name", SAID_OF_WORKERS)
def test_what_was_said_of_workers_holds(remade, name):
    given = loader()
    assert getattr(remade(given), name) == getattr(given, name)
