"""A sample's weight does not depend on its batch; where it does, somebody says so."""

import copy
import logging

import pytest
import reference
import torch
from models import mlp
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from irw_optim import IRWOptimizer, PerSampleLoss
from irw_optim.schemes import GlobalScheme, global_weights

N, FEATURES, CLASSES, BATCH = 30, 4, 3, 8


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix
        self.body, self.head = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.mix(self.body(x).tanh(), x))


def centred(h, x):
    return h - h.mean(0)


def shared_rows(h, x):
    """Samples with the same sign in all features share the row of the first of them."""
    _, groups = (x > 0).unique(dim=0, return_inverse=True)
    first = torch.full((len(x),), len(x)).scatter_reduce(
        0, groups, torch.arange(len(x)), reduce="amin"
    )
    return h[first[groups]]


def two_of_them(h, x):
    """Two samples of the data set, where they meet, and nobody else."""
    marked = (x[:, :1] > 50).to(h)
    return h + marked * (marked * h).sum(0)


def cumulative(h, x):
    return h.cumsum(0) / torch.arange(1, len(h) + 1).unsqueeze(1)


def normalised(h, x):
    return (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-3).sqrt()


MIXES = [centred, shared_rows, two_of_them, cumulative, normalised]
OPTIONS = {
    "irw": {},
    "centre": {"center": 1.0},
    "all worst off": {"alpha": 1.0},
    "cvar": {"weighting": "cvar"},
    "uniform": {"weighting": "uniform"},
    "autodiff": {"engine": "autodiff"},
}


def data_set(double=True):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N, FEATURES, generator=generator)
    x[0, 0] = x[1, 0] = 100.0
    y = torch.randint(0, CLASSES, (N,), generator=generator)
    return TensorDataset(x.double() if double else x, y)


def scheme_of(model, data, batch_size=BATCH, criterion=None, forward=None, **options):
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, **{"alpha": 0.3, **options}
    )
    criterion = nn.CrossEntropyLoss() if criterion is None else criterion
    loader = DataLoader(data, batch_size=batch_size)
    return GlobalScheme(optimizer, loader, criterion=criterion, forward=forward)


@pytest.fixture
def warned(caplog):
    def of():
        return [r for r in caplog.records if "from one batch to another" in r.getMessage()]

    caplog.set_level(logging.WARNING, logger="irw_optim")
    return of


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mix", MIXES, ids=lambda f: f.__name__)
def test_a_forward_that_mixes_samples_is_warned_of_once(mix, options, warned):
    torch.manual_seed(0)
    scheme = scheme_of(Mixing(mix).double(), data_set(), **options)
    scheme.renew()
    assert len(warned()) == 1
    scheme.renew()
    scheme.optimizer.detach()
    assert len(warned()) == 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_data_sets_of_one_batch_are_looked_at_too(options, warned):
    scheme_of(Mixing(centred).double(), data_set(), batch_size=N, **options).renew()
    assert len(warned()) == 1


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, BATCH, N, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_models_that_mix_nothing_are_not_warned_of(options, batch_size, double, warned):
    model = Mixing(lambda h, x: h)
    model = model.double() if double else model
    scheme_of(model, data_set(double), batch_size, **options).renew()
    assert not warned()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_not_warned_of(dtype, warned):
    x, y = data_set(False).tensors
    model = Mixing(lambda h, x: h).to(dtype)
    scheme_of(model, TensorDataset(x.to(dtype), y)).renew()
    model = Mixing(lambda h, x: h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scheme_of(model, TensorDataset(x, y)).renew()
    assert not warned()


class Augmented(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y = self.data[i]
        return x + torch.randn_like(x), y


def test_random_augmentation_is_warned_of(warned):
    scheme_of(Mixing(lambda h, x: h).double(), Augmented(data_set())).renew()
    assert len(warned()) == 1


# What else a model or its losses may be -----------------------------------------------------------


def loop_weights(model, losses_of, number):
    losses = torch.cat([losses_of(model, slice(i, i + 1)) for i in range(number)])
    G = reference.per_sample_gradients(losses, model.parameters())
    return reference.decide(losses.detach(), G, 0.3).weights


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_losses_that_are_derivatives_have_weights(engine, warned):
    """A physics-informed model: u'' = -u, by derivatives with respect to the input."""
    torch.manual_seed(0)
    model = mlp(1, 8, 1).double()
    points = torch.linspace(0, 3, N).double().unsqueeze(1)

    def residuals(model, batch):
        (x,) = batch
        x = x.detach().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return bend + u, torch.zeros_like(u)

    def losses_of(model, rows):
        return residuals(model, (points[rows],))[0].square().sum(1)

    expected = loop_weights(model, losses_of, N)
    actual = global_weights(
        model,
        nn.MSELoss(),
        DataLoader(TensorDataset(points), batch_size=BATCH),
        0.3,
        progress=False,
        forward=residuals,
        engine=engine,
    )
    assert reference.error(actual, expected) < 1e-9
    assert not warned()


def test_inputs_that_require_gradients_have_none_afterwards():
    torch.manual_seed(0)
    model = Mixing(lambda h, x: h).double()
    data = data_set()
    expected = scheme_of(copy.deepcopy(model), data).renew().weights
    data.tensors[0].requires_grad_()
    assert reference.error(scheme_of(model, data).renew().weights, expected) < 1e-12
    assert data.tensors[0].grad is None


def test_other_errors_of_a_forward_are_its_own():
    def broken(model, batch):
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        scheme_of(Mixing(centred), data_set(), forward=broken).renew()


def test_losses_by_hand_are_those_of_the_criterion(warned):
    criterion = PerSampleLoss(
        lambda output, y: nn.functional.cross_entropy(output, y, reduction="none")
    )
    model = Mixing(lambda h, x: h).double()
    by_hand = scheme_of(model, data_set(), criterion=criterion).renew().weights
    actual = global_weights(
        model, nn.CrossEntropyLoss(), DataLoader(data_set(), BATCH), 0.3, progress=False
    )
    assert reference.error(actual, by_hand) < 1e-12
