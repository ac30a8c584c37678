"""Scores of a data set by one forward pass: equal to the loop, or left to the engine."""

import logging

import pytest
import reference
import torch
from models import Recurrent
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import irw_optim.schemes.batch_losses as batch_losses
import irw_optim.schemes.dataset_gradients as dataset_gradients
from irw_optim import IRWOptimizer
from irw_optim.criterion import per_sample_losses
from irw_optim.gradients.engine import Engine
from irw_optim.schemes import GlobalScheme, global_weights
from irw_optim.schemes.batch_losses import BatchLosses, jvp
from irw_optim.schemes.reading import DatasetReader

N, CLASSES = 53, 3
MESSAGE = "forward mode being out"


class Sections(nn.Module):
    """Leaves some samples' first layer out of backward."""

    def __init__(self, frozen):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.frozen = frozen

    def forward(self, x):
        with torch.no_grad():
            unseen = self.first(x)
        return self.second(torch.where(self.frozen(x), unseen, self.first(x)).tanh())


class Sine(torch.autograd.Function):
    """Has no derivative in forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Sined(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.second(Sine.apply(self.first(x)))


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


FUSED = pytest.mark.cpu("a device's fused cells know no forward mode")
KINDS = [Pictures, recurrent, pytest.param(Attending, marks=FUSED), Tied]


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


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_is_the_product_with_the_rows_of_a_loop(kind):
    model, (x, y) = kind().double().eval(), batch()
    before = dict(model.named_parameters())
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    rows = reference.per_sample_gradients(losses, trained(model))
    direction = torch.randn(N, dtype=torch.float64) @ rows
    expected = rows @ direction
    pieces = direction.split([p.numel() for p in trained(model)])
    along_them = {p: v.view_as(p) for p, v in zip(trained(model), pieces, strict=True)}

    def losses_of(batch):
        return per_sample_losses(nn.CrossEntropyLoss(), model(batch[0]), batch[1])

    actual = jvp(model, losses_of, (x, y), along_them)
    assert reference.error(actual, expected) < 1e-10
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_makes_the_scores_where_it_can(kind, caplog, monkeypatch):
    used = []
    monkeypatch.setattr(
        dataset_gradients, "jvp", lambda *args: used.append(1) or jvp(*args), raising=True
    )
    caplog.set_level(logging.INFO, "irw_optim")
    model, (x, y) = kind().double(), batch()
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
    assert used
    assert MESSAGE not in caplog.text


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Sined(), "jvp"),
        (Sections(lambda x: x[:, :1] > 0), "differs from backward"),
    ],
    ids=["no derivative", "no_grad for some samples"],
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


def test_what_failed_once_is_not_tried_again(monkeypatch):
    tried = []
    monkeypatch.setattr(
        dataset_gradients, "jvp", lambda *args: tried.append(1) or jvp(*args), raising=True
    )
    model, criterion = Sined(), nn.CrossEntropyLoss()
    inner = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = IRWOptimizer(inner, alpha=0.2, model=model, criterion=criterion)
    scheme = GlobalScheme(optimizer, DataLoader(TensorDataset(*batch(torch.float32)), 8))
    scheme.renew()
    scheme.renew()
    assert len(tried) == 1


def test_some_of_the_rows_know_no_sum_of_all(caplog):
    caplog.set_level(logging.INFO, "irw_optim")
    model, (x, y) = Pictures().double().eval(), batch()
    losses_of = BatchLosses(model, nn.CrossEntropyLoss(), None)
    reader = DatasetReader(DataLoader(TensorDataset(x, y), batch_size=8))
    everything = (losses_of, Engine(model), set(trained(model)).__contains__, lambda _: None)
    rows = dataset_gradients.DatasetGradients(reader, *everything)
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


def test_numbers_of_low_precision_are_left_to_the_engine(monkeypatch):
    def asked(*args, **options):
        pytest.fail("was asked")

    monkeypatch.setattr(dataset_gradients, "jvp", asked)
    monkeypatch.setattr(dataset_gradients, "backward_to", asked)
    model, (x, y) = Tied(), batch(torch.float32)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        weights_of(model, x, y)
    weights_of(model.bfloat16(), x.bfloat16(), y)


@pytest.mark.parametrize("engine", ["ghost", "autodiff"])
def test_an_engine_that_is_asked_for_makes_them_itself(engine, monkeypatch):
    monkeypatch.setattr(dataset_gradients, "jvp", lambda *args: pytest.fail("was asked"))
    model, (x, y) = Pictures().double(), batch()
    actual = weights_of(model, x, y, engine=engine)
    assert reference.error(actual, by_hand(model, x, y)) < 1e-10


def test_the_sum_over_s_goes_no_further_back_than_the_scores_need(monkeypatch):
    asked, real = set(), dataset_gradients.backward_to

    def noting(leaves, *args, **options):
        asked.update(leaves)
        return real(leaves, *args, **options)

    monkeypatch.setattr(dataset_gradients, "backward_to", noting)
    model, (x, y) = Pictures().double(), batch()
    weights_of(model, x, y, score_parameters="last")
    assert asked == set(model.layers[-1].parameters())


class Attention(nn.Module):
    """2 heads of 6 numbers over T positions."""

    def __init__(self):
        super().__init__()
        self.embedding, self.projection = nn.Embedding(6, 8), nn.Linear(8, 36)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        h = self.projection(self.embedding(x)).unflatten(-1, (2, 18)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(*h.chunk(3, dim=-1))
        return self.head(mixed.transpose(1, 2).flatten(-2).mean(1))


def batches_along(monkeypatch, model, x, y):
    """The sizes of the batches that went through forward mode; the weights are right."""
    sizes, real = [], batch_losses.jvp

    def noting(model, losses_of, batch, direction):
        sizes.append(len(batch[1]))
        return real(model, losses_of, batch, direction)

    monkeypatch.setattr(dataset_gradients, "jvp", noting)
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
    return sizes


def test_losses_are_read_two_batches_at_once_without_a_graph():
    model, (x, y), read = Pictures().double(), batch(), []
    model.register_forward_hook(lambda _, args, out: read.append((len(out), out.requires_grad)))
    weights_of(model, x, y, engine="ghost")
    alone = [(14, False)] + [(13, False)] * 3  # dealt out evenly
    of_the_worst_off, of_all = [(8, True), (3, True)], [(8, True)] * 6 + [(5, True)]
    assert read == alone + of_the_worst_off + of_all


@pytest.mark.parametrize("length", [18, 19])
def test_long_attention_is_left_to_the_engine(length, monkeypatch):
    """Two heads of 6 numbers: from 3 times as many positions on, their matrix is the most of it."""
    model, x, y = Attention().double(), torch.randint(6, (N, length)), batch()[1]
    assert bool(batches_along(monkeypatch, model, x, y)) == (length == 18)


def test_attention_that_makes_its_matrix_anyway_does_not_count(monkeypatch):
    model, x, y = Attention().double(), torch.randint(6, (N, 19)), batch()[1]
    with sdpa_kernel(SDPBackend.MATH):
        assert batches_along(monkeypatch, model, x, y)


def test_memory_runs_out_of_forward_mode_and_the_engine_goes_on(monkeypatch):
    def jvp(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(dataset_gradients, "jvp", jvp)
    model, (x, y) = Pictures().double(), batch()
    assert reference.error(weights_of(model, x, y), by_hand(model, x, y)) < 1e-10
