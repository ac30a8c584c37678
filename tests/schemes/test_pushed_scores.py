"""Scores of a data set, pushed forwards: equal to the loop, or left to the engine."""

import logging

import pytest
import reference
import torch
from models import OnceDifferentiable, Recurrent
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import irw_optim.schemes.dataset_gradients as dataset_gradients
from irw_optim import IRWOptimizer
from irw_optim.gradients.backward_passes import BackwardPasses
from irw_optim.gradients.engine import Engine
from irw_optim.schemes import GlobalScheme, global_weights
from irw_optim.schemes.batch_losses import BatchLosses
from irw_optim.schemes.dataset_gradients import DatasetGradients
from irw_optim.schemes.reading import DatasetReader

N, CLASSES = 53, 3
MESSAGE = "do not go forwards"


class Sections(nn.Module):
    """Leaves some samples' first layer out of backward, as a hook does."""

    def __init__(self, frozen):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.frozen = frozen

    def forward(self, x):
        h, frozen = self.first(x), self.frozen(x)
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient.masked_fill(frozen, 0.0))
        return self.second(h.tanh())


class Sined(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.second(OnceDifferentiable.apply(self.first(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.last.bias.requires_grad_(False)
        self.again = self.inner

    def forward(self, x):
        return self.last(self.again(self.inner(x).relu()) + x @ self.inner.weight)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 5)),
            nn.Conv1d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.LayerNorm(8),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x):
        return self.layers(x)


def recurrent():
    layer = nn.RNN(1, 4, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (-1, 1)), Recurrent(layer, CLASSES))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 16, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
        self.memory = nn.GRU(16, 4, batch_first=True)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(4, CLASSES))

    def forward(self, x):
        h = self.layer(self.embedding(x.abs().long().clamp(max=5)))
        return self.head(self.memory(h)[0][:, -1])


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.last(self.cells(x.unsqueeze(-1))[0][:, -1])


class Detached(Sections):
    """The same by no_grad, which the graph shows."""

    def forward(self, x):
        with torch.no_grad():
            unseen = self.first(x)
        return self.second(torch.where(self.frozen(x), unseen, self.first(x)).tanh())


def detached():
    return Detached(lambda x: x[:, :1] > 0)


KINDS = [Pictures, recurrent, Attending, Tied, detached]


def batch(dtype=torch.float64):
    return torch.randn(N, 5, dtype=dtype), torch.randint(0, CLASSES, (N,))


def by_hand(model, x, y, alpha=0.2):
    model.eval()
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    return reference.step(losses, trained(model), alpha).weights


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights_of(model, x, y, **options):
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    return global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, progress=False, **options)


def rows_of(model, x, y):
    losses_of = BatchLosses(model, nn.CrossEntropyLoss(), None)
    reader = DatasetReader(DataLoader(TensorDataset(x, y), batch_size=8))
    scored = set(trained(model)).__contains__
    return DatasetGradients(reader, losses_of, Engine(model), scored, lambda _: None)


@pytest.fixture
def pushed(monkeypatch):
    """The products that were begun."""
    found, real = [], DatasetGradients._pushed
    monkeypatch.setattr(DatasetGradients, "_pushed", lambda *of: found.append(1) or real(*of))
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_is_the_product_with_the_rows_of_a_loop(kind):
    model, (x, y) = kind().double().eval(), batch()
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    rows = reference.per_sample_gradients(losses, trained(model))
    direction = torch.randn(N, dtype=torch.float64) @ rows
    expected = rows @ direction
    pieces = direction.split([p.numel() for p in trained(model)])
    along_them = {p: v.view_as(p) for p, v in zip(trained(model), pieces, strict=True)}
    actual = rows_of(model, x, y)._pushed(along_them)
    assert reference.error(actual, expected) < 1e-10
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_makes_the_scores_where_it_can(kind, caplog, pushed):
    caplog.set_level(logging.INFO, "irw_optim")
    model, (x, y) = kind().double(), batch()
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
    assert pushed
    assert MESSAGE not in caplog.text


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Sined(), "OnceDifferentiableBackward"),
        (Sections(lambda x: x[:, :1] > 0), "differs from backward"),
    ],
    ids=["no second derivative", "a hook for some samples"],
)
def test_the_engine_makes_them_where_it_cannot(model, reason, caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    x, y = batch()
    model.double()
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
    [said] = [r.getMessage() for r in caplog.records if MESSAGE in r.getMessage()]
    assert reason in said


def test_what_differs_after_the_first_batch_shows_in_the_sum_over_s(caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    x, y = batch()
    x[:16, 0] = -1.0  # the first batch, which is compared, is alike either way
    x[40:, 0] = 5.0
    model = Sections(lambda x: x[:, :1] > 4).double()
    with torch.no_grad():
        model.second.weight *= 20
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
    assert MESSAGE in caplog.text


def test_what_differs_outside_of_s_shows_in_the_first_batch(caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    x, y = batch()
    x[:, 0] = -1.0
    x[:4, 0] = 5.0
    model = Sections(lambda x: x[:, :1] > 4).double()
    with torch.no_grad():
        y[:4] = model(x[:4]).argmax(1)  # too well off to be in S
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
    assert MESSAGE in caplog.text


def test_what_failed_once_is_not_tried_again(pushed):
    model, criterion = Sined(), nn.CrossEntropyLoss()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = IRWOptimizer(inner, alpha=0.2, model=model, criterion=criterion)
    scheme = GlobalScheme(optimizer, DataLoader(TensorDataset(*batch(torch.float32)), 8))
    scheme.renew()
    scheme.renew()
    assert len(pushed) == 1


def test_some_of_the_rows_know_no_sum_of_all(caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    model, (x, y) = Pictures().double().eval(), batch()
    rows = rows_of(model, x, y)
    direction = rows.combine(torch.ones(N, dtype=torch.float64))
    expected = rows.dot(direction)
    some = torch.arange(N) % 3 == 0
    torch.testing.assert_close(rows.of(some).dot(direction), expected[some])
    assert MESSAGE not in caplog.text


@pytest.mark.parametrize("engine", ["auto", "ghost"])
def test_a_long_short_term_memory(engine):
    """Whose inner values are computed again, in place."""
    torch.manual_seed(0)
    model, (x, y) = Memory().double(), batch()
    actual = weights_of(model, x, y, engine=engine)
    assert reference.error(actual, by_hand(model, x, y)) < 1e-10


def test_numbers_of_low_precision_are_left_to_the_engine(monkeypatch, pushed):
    def asked(*args, **options):
        pytest.fail("was asked")

    monkeypatch.setattr(dataset_gradients, "backward_to", asked)
    model, (x, y) = Tied(), batch(torch.float32)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        weights_of(model, x, y)
    weights_of(model.bfloat16(), x.bfloat16(), y)
    assert not pushed


@pytest.mark.parametrize("engine", ["ghost", "autodiff"])
def test_an_engine_that_is_asked_for_makes_them_itself(engine, pushed):
    model, (x, y) = Pictures().double(), batch()
    actual = weights_of(model, x, y, engine=engine)
    assert reference.error(actual, by_hand(model, x, y)) < 1e-10
    assert not pushed


def test_the_sum_over_s_goes_no_further_back_than_the_scores_need(monkeypatch):
    asked, real = set(), dataset_gradients.backward_to

    def noting(leaves, *args, **options):
        asked.update(leaves)
        return real(leaves, *args, **options)

    monkeypatch.setattr(dataset_gradients, "backward_to", noting)
    model, (x, y) = Pictures().double(), batch()
    weights_of(model, x, y, score_parameters="last")
    assert asked == set(model.layers[-1].parameters())


def test_losses_are_read_two_batches_at_once_without_a_graph():
    model, (x, y), read = Pictures().double(), batch(), []
    model.register_forward_hook(lambda _, args, out: read.append((len(out), out.requires_grad)))
    weights_of(model, x, y, engine="ghost")
    alone = [(14, False)] + [(13, False)] * 3  # dealt out evenly
    of_the_worst_off, of_all = [(8, True), (3, True)], [(8, True)] * 6 + [(5, True)]
    assert read == alone + of_the_worst_off + of_all


def test_memory_runs_out_and_the_engine_goes_on(monkeypatch):
    def push(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(BackwardPasses, "push", push)
    model, (x, y) = Pictures().double(), batch()
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10


@pytest.mark.parametrize(("small", "at_once"), [(0, 8), (float("inf"), 16)])
def test_two_batches_go_forwards_at_once_where_their_graphs_are_small(small, at_once, monkeypatch):
    sizes, real = [], BackwardPasses.push

    def push(passes, direction):
        sizes.append(len(passes.losses))
        return real(passes, direction)

    monkeypatch.setattr(dataset_gradients, "SMALL", small)
    monkeypatch.setattr(BackwardPasses, "push", push)
    model, (x, y) = Tied().double().eval(), batch()
    rows = rows_of(model, x, y)
    rows.dot(rows.combine(torch.ones(N, dtype=torch.float64)))
    assert sizes[:2] == [8, at_once]
    assert sum(sizes) == N
