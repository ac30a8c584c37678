"""Copies of a training with a global scheme are whole: nothing in them is the original's."""

import copy
import io
import pickle

import pytest
import reference
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import IRWOptimizer
from irw_optim.monitor import IRWMonitor
from irw_optim.schemes import GlobalScheme, IndexedDataset, ResamplingSampler
from irw_optim.schemes.reading import DatasetReader

N, BATCH = 20, 5


def by_torch(parts):
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda parts: pickle.loads(pickle.dumps(parts)),
    "torch.save": by_torch,
}
USES = ("reweighting", "resampling")


@pytest.fixture(params=WAYS)
def copied(request):
    return WAYS[request.param]


def parts(use="reweighting", **options):
    """Model, criterion, optimizer, monitor and scheme."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 2).double(), nn.CrossEntropyLoss()
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, model=model, criterion=criterion
    )
    data = TensorDataset(torch.randn(N, 4).double(), torch.randint(0, 2, (N,)))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, **options)
    monitor = IRWMonitor(optimizer)
    scheme = GlobalScheme(optimizer, loader, use=use, refresh=3, unit="steps")
    return model, criterion, optimizer, monitor, scheme


def train(training, epochs=1):
    model, criterion, optimizer, _, scheme = training
    for _ in range(epochs):
        for x, y in scheme:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()


def state_of(training):
    model, _, _, monitor, scheme = training
    return [p.tolist() for p in model.parameters()], monitor.rows(), scheme.weights.tolist()


def data_of(scheme):
    return scheme._reader.loader.dataset.tensors


@pytest.mark.parametrize("use", USES)
def test_a_copied_scheme_reads_the_copied_model(use, copied):
    original = parts(use)
    train(original)
    before = state_of(original)
    model, _, _, _, scheme = copied(original)
    with torch.no_grad():
        model.weight.mul_(5)
    x, y = data_of(scheme)
    expected = nn.functional.cross_entropy(model(x), y, reduction="none")
    assert reference.error(scheme.renew().losses, expected) < 1e-12
    assert state_of(original) == before


@pytest.mark.parametrize("use", USES)
def test_a_copy_trains_as_the_original_would(use, copied):
    original = parts(use)
    train(original)
    twin = copied(original)
    before = state_of(original)
    states = torch.get_rng_state()
    train(twin, epochs=2)
    assert state_of(original) == before
    torch.set_rng_state(states)
    train(original, epochs=2)
    # The numbers by name: NaN is not equal to itself, nor may a copy round differently.
    assert state_of(twin)[0] == state_of(original)[0]
    assert state_of(twin)[2] == state_of(original)[2]
    for name in ("step", "held_for", "mean_loss"):
        assert [r[name] for r in twin[3].rows()] == [r[name] for r in original[3].rows()]


def test_a_copy_is_told_of_its_own_batches(copied):
    original = parts()
    batch = next(iter(original[4]))
    model, criterion, _, _, _ = copied(original)
    with pytest.raises(RuntimeError, match="does not know which samples this batch holds"):
        criterion(model(batch[0]), batch[1])
    original[1](original[0](batch[0]), batch[1]).backward()  # which the original knows


@pytest.mark.parametrize("use", USES)
def test_a_copy_gives_the_local_scheme_back_and_takes_another(use, copied):
    original = parts(use)
    train(original)
    model, criterion, optimizer, _, scheme = copied(original)
    scheme.detach()
    x, y = data_of(scheme)
    criterion(model(x), y).backward()
    local = optimizer.last_step.weights
    assert local.shape == (N,)
    again = GlobalScheme(optimizer, DataLoader(TensorDataset(x, y), batch_size=BATCH))
    assert reference.error(again.renew().weights, local) < 1e-12
    assert original[2].scheme is original[4]._held
    train(original)


def test_detached_schemes_and_monitors_are_attached_anew():
    model, criterion, optimizer, monitor, scheme = parts()
    train((model, criterion, optimizer, monitor, scheme))
    rows = len(monitor)
    scheme.detach()
    monitor.detach()
    optimizer.detach()
    optimizer = IRWOptimizer(optimizer.inner, alpha=0.3, model=model, criterion=criterion)
    second = IRWMonitor(optimizer)
    train((model, criterion, optimizer, second, GlobalScheme(optimizer, scheme._reader.loader)))
    assert len(monitor) == rows
    assert len(second) == N // BATCH
    assert not any(module.training is False for module in model.modules())


@pytest.mark.cpu("its worker is forked, which a device does not survive")
def test_workers_that_persist_stay_with_the_original():
    training = parts(num_workers=1, persistent_workers=True)
    loader = training[4].loader.loader
    next(iter(training[4].loader))
    assert loader._iterator is not None
    twin = copy.deepcopy(training)
    assert twin[4].loader.loader._iterator is None
    assert loader._iterator is not None
    loader._iterator._shutdown_workers()


def test_samplers_data_sets_and_readers_are_copied(copied):
    sampler = ResamplingSampler(torch.tensor([0.2, 0.3, 0.5]), num_samples=40)
    drawn = iter(sampler)
    for _ in range(7):
        next(drawn)
    twin = copied(sampler)
    assert list(twin) == list(sampler)
    data = IndexedDataset(TensorDataset(torch.arange(6.0)))
    loader = DataLoader(data, batch_size=2, collate_fn=data.collate(list))
    assert next(iter(copied(loader)))[1] == next(iter(loader))[1]
    reader = DatasetReader(DataLoader(data.dataset, batch_size=2))
    first = [batch[0].tolist() for _, batch in copied(reader).batches(torch.tensor([3, 1, 2]))]
    assert first == [[3.0, 1.0], [2.0]]
