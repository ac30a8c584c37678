"""The global scheme is the local one on a batch of all samples, ignored targets among them."""

import itertools

import pytest
import reference
import torch
from models import mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from irw_optim import DBSCANFilter, IRWOptimizer
from irw_optim.schemes import GlobalScheme, global_weights

N, FEATURES, CLASSES, LENGTH = 24, 4, 3, 5
IGNORED = -100


class Tagger(nn.Module):
    """One prediction a token, (B, classes, T), as the cross entropy wants it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FEATURES, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh()).movedim(-1, 1)


def one_class_each():
    x, y = torch.randn(N, FEATURES), torch.randint(0, CLASSES, (N,))
    y[::3] = IGNORED
    return x, y, mlp(FEATURES, 6, CLASSES)


def sequences():
    """Partly ignored, and every fourth altogether."""
    x, y = torch.randn(N, LENGTH, FEATURES), torch.randint(0, CLASSES, (N, LENGTH))
    y[torch.rand(N, LENGTH) < 0.4] = IGNORED
    y[::4] = IGNORED
    return x, y, Tagger()


KINDS = {
    "classes": (one_class_each, {}),
    "class weights": (one_class_each, {"weight": torch.tensor([0.2, 1.0, 3.0]).double()}),
    "sum": (one_class_each, {"reduction": "sum"}),
    "another index": (one_class_each, {"ignore_index": 1}),
    "sequences": (sequences, {}),
    "weighted sequences": (sequences, {"weight": torch.tensor([0.2, 1.0, 3.0]).double()}),
}


class Setting:
    """Model, criterion and data, with what the local scheme and a loop make of them."""

    def __init__(self, kind):
        torch.manual_seed(3)
        make, options = KINDS[kind]
        x, self.y, model = make()
        if "ignore_index" in options:
            self.y[self.y == IGNORED] = 1
        self.x, self.model = x.double(), model.double()
        self.criterion = nn.CrossEntropyLoss(**options)
        self.data = TensorDataset(self.x, self.y)

    def loader(self, batch_size=7, **options):
        return DataLoader(self.data, batch_size=batch_size, **options)

    def optimizer(self, alpha=0.3, **options):
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.0)
        return IRWOptimizer(sgd, alpha=alpha, model=self.model, criterion=self.criterion, **options)

    def local(self, **options):
        optimizer = self.optimizer(**options)
        self.criterion(self.model(self.x), self.y).backward()
        optimizer.detach()
        return optimizer.last_step

    @property
    def ignored(self):
        targets = self.y != self.criterion.ignore_index
        return (~targets).reshape(N, -1).all(1)

    def by_loop(self, alpha, *, removed=(), class_balance=False, score_parameters=None, **options):
        criterion = nn.CrossEntropyLoss(
            weight=self.criterion.weight,
            ignore_index=self.criterion.ignore_index,
            reduction="none",
        )
        elements = criterion(self.model(self.x), self.y).reshape(N, -1)
        counts = (self.y != criterion.ignore_index).reshape(N, -1).sum(1)
        losses = elements.sum(1) / counts.clamp(min=1)
        parameters = list(self.model.parameters())
        if score_parameters == "last":
            parameters = parameters[-2:]
        G = reference.per_sample_gradients(losses, parameters)
        losses = losses.detach()
        labels = self.y.tolist() if class_balance else None
        gone = {*self.ignored.nonzero().flatten().tolist(), *removed}
        return reference.decide(losses, G, alpha, removed=gone, labels=labels, **options)


def combinations(kind):
    rules = [
        {"alpha": 0.3},
        {"alpha": 1.0},
        {"alpha": 0.3, "center": 1.0},
        {"alpha": 0.3, "weighting": "cvar"},
        {"alpha": 0.3, "weighting": "uniform"},
        {"alpha": 0.3, "weighting": _along_everybody},
    ]
    choices = {
        "mix": (0.0, 0.5),
        "outliers": (None, DBSCANFilter(min_samples=3, quantile=0.8)),
        "score_parameters": (None, "last"),
        "class_balance": (False, True) if "sequences" not in kind else (False,),
    }
    for rule, *values in itertools.product(rules, *choices.values()):
        yield {**rule, **dict(zip(choices, values, strict=True))}


def _along_everybody(losses, gradients, worst_off):
    return gradients.dot(gradients.combine(torch.ones_like(losses)))


def assert_alike(actual, expected):
    assert reference.error(actual.weights, expected.weights) < 1e-10
    assert reference.error(actual.scores, expected.scores) < 1e-10
    assert reference.error(actual.losses, expected.losses) < 1e-10
    for name in ("worst_off", "outliers", "fallback"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
    if expected.labels is not None:
        assert torch.equal(actual.labels, expected.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_that_of_one_batch_of_all_samples(kind):
    setting = Setting(kind)
    assert 0 < setting.ignored.sum() < N
    for options in combinations(kind):
        expected = setting.local(**options)
        optimizer = setting.optimizer(**options)
        scheme = GlobalScheme(optimizer, setting.loader(), outlier_block=N)
        try:
            assert_alike(scheme.renew(), expected)
        finally:
            optimizer.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_samples_are_none_in_a_loop_over_the_others(kind):
    setting = Setting(kind)
    outliers = DBSCANFilter(min_samples=3, quantile=0.8)
    for options in combinations(kind):
        if options.pop("weighting", None) is not None:
            continue
        alpha, filtered = options.pop("alpha"), options.pop("outliers")
        removed = []
        if filtered is not None:
            scored = options["score_parameters"]
            record = setting.local(alpha=alpha, outliers=outliers, score_parameters=scored)
            removed = record.outliers.nonzero().flatten().tolist()
        expected = setting.by_loop(alpha, removed=removed, **options)
        actual = global_weights(
            setting.model,
            setting.criterion,
            setting.loader(),
            alpha,
            filtered,
            progress=False,
            outlier_block=N,
            **options,
        )
        assert reference.error(actual, expected.weights) < 1e-10
        assert actual[setting.ignored].abs().sum() == 0


def test_blocks_for_a_filter_are_of_samples_that_have_a_target():
    setting = Setting("classes")
    seen = []

    def nobody(gram):
        seen.append((len(gram), float(gram.diagonal().min())))
        return torch.zeros(len(gram), dtype=torch.bool)

    optimizer = setting.optimizer(outliers=nobody)
    GlobalScheme(optimizer, setting.loader(), outlier_block=6).renew()
    assert sum(size for size, _ in seen) == N - int(setting.ignored.sum())
    assert all(size <= 6 and least > 0 for size, least in seen)


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
@pytest.mark.parametrize("kind", ["classes", "class weights", "sequences"])
def test_steps_on_held_weights_leave_ignored_samples_out(kind, use):
    setting = Setting(kind)
    optimizer = setting.optimizer()
    scheme = GlobalScheme(optimizer, setting.loader(shuffle=True), use=use)
    for epoch in range(2):
        for x, y in scheme:
            optimizer.zero_grad()
            setting.criterion(setting.model(x), y).backward()
            indices = scheme._held.indices
            assert torch.equal(setting.x[indices], x)
            if use == "reweighting":
                held = scheme.weights[indices]
                fallback = (~setting.ignored[indices]).double()
                expected = held if held.sum() else fallback
                weights = optimizer.last_step.weights
                assert reference.error(weights, expected / expected.sum().clamp(min=1e-30)) < 1e-12
            elif epoch:
                assert not setting.ignored[indices].any()


def test_a_batch_without_held_weight_is_averaged_over_those_with_a_target():
    setting = Setting("classes")
    optimizer = setting.optimizer(alpha=0.05)
    scheme = GlobalScheme(optimizer, setting.loader())
    record = scheme.renew()
    nobody = ((record.weights == 0) & ~setting.ignored).nonzero().flatten()[:2]
    rows = torch.cat([nobody, setting.ignored.nonzero().flatten()[:2]])
    scheme.select(rows)
    setting.criterion(setting.model(setting.x[rows]), setting.y[rows]).backward()
    assert optimizer.last_step.weights.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert bool(optimizer.last_step.fallback)


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_averages_as_the_criterion_does(kind):
    setting = Setting(kind)
    optimizer = setting.optimizer(warmup_steps=1000)
    for x, y in GlobalScheme(optimizer, setting.loader(shuffle=True)):
        optimizer.zero_grad()
        setting.criterion(setting.model(x), y).backward()
        actual = [p.grad.clone() for p in setting.model.parameters()]
        optimizer.zero_grad()
        plain = nn.CrossEntropyLoss(
            setting.criterion.weight,
            ignore_index=setting.criterion.ignore_index,
            reduction=setting.criterion.reduction,
        )
        plain(setting.model(x), y).backward()
        for gradient, p in zip(actual, setting.model.parameters(), strict=True):
            assert reference.error(gradient, p.grad) < 1e-12


def test_where_everything_is_ignored_both_schemes_do_the_same():
    setting = Setting("classes")
    setting.y.fill_(IGNORED)
    for options in ({}, {"class_balance": True}, {"mix": 0.5}, {"alpha": 0.3, "weighting": "cvar"}):
        expected = setting.local(**options)
        optimizer = setting.optimizer(**options)
        assert_alike(GlobalScheme(optimizer, setting.loader()).renew(), expected)
        optimizer.detach()
