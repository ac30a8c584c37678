"""Loaders that are made from the user's keep what was said of its workers."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from irw_optim import IRWOptimizer
from irw_optim.schemes import GlobalScheme, global_weights
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


class Estimated:
    """Batches by their size in memory: it does not know before how many there will be."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        if self.number is None:
            raise TypeError("how many is not known")
        return self.number

    def __iter__(self):
        return iter([[0, 1], [2], [3, 4], [5, 6], [7, 8]])


def scheme_over(number):
    data = TensorDataset(torch.randn(9, 2), torch.arange(9) % 2)
    model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = IRWOptimizer(sgd, alpha=0.3, model=model, criterion=criterion)
    loader = DataLoader(data, batch_sampler=Estimated(number))
    return GlobalScheme(optimizer, loader, batch_size=4)


@pytest.mark.parametrize("number", [3, 5, 8])
def test_an_epoch_has_all_batches_whatever_the_loader_takes_for_their_number(number):
    scheme = scheme_over(number)
    for _ in range(2):
        assert [len(y) for _, y in scheme] == [2, 1, 2, 2, 2]


def test_batches_without_a_size_ask_for_that_of_the_renewals():
    data = TensorDataset(torch.randn(9, 2), torch.arange(9) % 2)
    loader = DataLoader(data, batch_sampler=[[0, 1, 2], [5], [7, 8]])
    model, criterion = nn.Linear(2, 2), nn.CrossEntropyLoss()
    with pytest.raises(TypeError, match=r"batch_size=None: expected batch_size=64, say: the"):
        global_weights(model, criterion, loader, 0.3)
    asked = global_weights(model, criterion, loader, 0.3, batch_size=64, progress=False)
    whole = global_weights(model, criterion, DataLoader(data, 9), 0.3, progress=False)
    assert torch.allclose(asked, whole, atol=1e-6)


def test_a_loader_without_a_length_is_refused_when_the_scheme_is_made():
    with pytest.raises(TypeError, match=r"no length \(how many is not known.*with __len__"):
        scheme_over(None)
