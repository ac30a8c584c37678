"""Weights of a whole data set against a plain autograd loop over all samples, in float64."""

import logging
import random
import sys

import models
import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from irw_optim import DBSCANFilter, PerSampleLoss
from irw_optim.schemes import global_weights

N, FEATURES, CLASSES = 53, 5, 3
TOLERANCE = 1e-10


class Transformer(nn.Module):
    """Embeddings and attention; as wide as a batch is long."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x.abs().long().clamp(max=5))).mean(1))


def mlp():
    return models.mlp(FEATURES, 8, CLASSES)


def lstm():  # covered by autodiff alone
    layer = nn.LSTM(1, 4, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (-1, 1)), models.Recurrent(layer, CLASSES))


def normed():
    return nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    )


MODELS = {
    "mlp": mlp,
    "batch_norm_and_dropout": normed,
    "transformer": Transformer,
    "lstm": lstm,
}


@pytest.fixture
def data():
    x = torch.randn(N, FEATURES, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, CLASSES, (N,)))


@pytest.fixture
def model(data):
    return trained(mlp(), data)


def trained(model, data):
    """Some steps, so that running statistics and losses are no longer those of the beginning."""
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def by_hand(model, data, alpha, scored=None, **options):
    """The oracle: all N losses in one graph, one backward pass each."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    losses = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1], reduction="none")
    step = reference.step(losses, list(model.parameters()), alpha, scored=scored, **options)
    for module, mode in training.items():
        module.training = mode
    return step


def weights_of(model, data, alpha=0.2, batch_size=16, shuffle=True, **options):
    loader = DataLoader(data, batch_size=batch_size, shuffle=shuffle)
    return global_weights(model, nn.CrossEntropyLoss(), loader, alpha, progress=False, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_equal_to_a_loop_over_all_samples(kind, data):
    model = trained(MODELS[kind](), data)
    expected = by_hand(model, data, 0.2).weights
    assert reference.error(weights_of(model, data), expected) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"center": 1.0},
        {"mix": 0.3},
        {"class_balance": True},
        {"center": 0.5, "class_balance": True},
    ],
    ids=str,
)
def test_options_are_those_of_a_mini_batch_of_all_samples(options, model, data):
    asked = dict(options)
    labels = data.tensors[1].tolist() if asked.pop("class_balance", False) else None
    expected = by_hand(model, data, 0.3, labels=labels, **asked).weights
    assert reference.error(weights_of(model, data, 0.3, **options), expected) < TOLERANCE


@pytest.mark.parametrize("chosen", ["last", ["0.weight"]], ids=str)
def test_scores_from_chosen_parameters(chosen, model, data):
    scored = list(model[2].parameters()) if chosen == "last" else [model[0].weight]
    expected = by_hand(model, data, 0.2, scored=scored).weights
    actual = weights_of(model, data, score_parameters=chosen)
    assert reference.error(actual, expected) < TOLERANCE
    assert reference.error(weights_of(model, data), expected) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 7, N, 1000])
def test_independent_of_the_batch_size(batch_size, data):
    model = trained(normed(), data)
    expected = weights_of(model, data, batch_size=16)
    assert reference.error(weights_of(model, data, batch_size=batch_size), expected) < TOLERANCE
    asked = weights_of(model, data, batch_size=3) if batch_size == 7 else expected
    assert reference.error(asked, expected) < TOLERANCE


def test_independent_of_the_loaders_order(model, data):
    criterion = nn.CrossEntropyLoss()
    expected = weights_of(model, data, shuffle=False)
    loaders = [
        DataLoader(data, batch_size=16, shuffle=True, drop_last=True),
        DataLoader(data, batch_size=16, sampler=WeightedRandomSampler(torch.ones(N), 5)),
        DataLoader(data, batch_sampler=[[3, 1], [4, 1, 5]]),
    ]
    for loader in loaders:
        actual = global_weights(model, criterion, loader, 0.2, progress=False, batch_size=16)
        assert torch.equal(actual, expected)


def test_a_permuted_data_set_has_permuted_weights(model, data):
    order = torch.randperm(N)
    permuted = TensorDataset(*(tensor[order] for tensor in data.tensors))
    assert reference.error(weights_of(model, permuted), weights_of(model, data)[order]) < TOLERANCE


def test_single_precision_agrees_to_rounding(model, data):
    expected = by_hand(model, data, 0.2).weights
    single = TensorDataset(data.tensors[0].float(), data.tensors[1])
    assert reference.error(weights_of(model.float(), single, batch_size=8), expected) < 1e-4


@pytest.mark.cpu("its workers are forked, which a device does not survive")
def test_two_workers_read_what_the_process_itself_reads(model, data):
    loader = DataLoader(data, batch_size=16, shuffle=True, num_workers=2)
    actual = global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, progress=False)
    assert torch.equal(actual, weights_of(model, data))


def test_reads_everybody_twice_and_the_worst_off_three_times(model, data):
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    weights_of(model, data, 0.2, batch_size=8)
    assert max(rows) == 16  # two batches at once where there is no graph, or a small one
    assert sum(rows) == N + 11 + N + 8  # ceil(0.2 * 53) = 11; the first batch is compared


# IRWO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [10, 20, N, 1000])
def test_outliers_leave_block_by_block(block, model, data):
    outliers = DBSCANFilter(eps="auto", min_samples=3, quantile=0.8)
    G = by_hand(model, data, 0.2).G
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    pieces = order.tensor_split(-(-N // block))
    assert max(map(len, pieces)) <= block
    removed = [int(i) for piece in pieces for i in piece[outliers(G[piece] @ G[piece].T)]]
    assert removed
    expected = by_hand(model, data, 0.2, removed=removed).weights
    actual = weights_of(model, data, outliers=outliers, outlier_block=block)
    assert reference.error(actual, expected) < TOLERANCE
    assert actual[removed].sum() == 0


def test_a_filter_that_removes_everybody_of_a_block_keeps_the_block(model, data):
    def everybody(gram):
        return torch.ones(len(gram), dtype=torch.bool)

    actual = weights_of(model, data, outliers=everybody, outlier_block=20)
    assert reference.error(actual, by_hand(model, data, 0.2).weights) < TOLERANCE


def test_a_filter_that_returns_no_mask_is_refused(model, data):
    with pytest.raises(TypeError, match="expected a bool mask"):
        weights_of(model, data, outliers=lambda gram: gram.diagonal())


# What must be as it was -----------------------------------------------------------------------


def test_model_and_random_states_are_as_before(data):
    class Noisy(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            random.random(), np.random.rand(), torch.rand(())
            return tuple(tensor[i] for tensor in data.tensors)

    model = trained(normed(), data)
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model[0].weight.grad = torch.ones_like(model[0].weight)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(Noisy(), batch_size=16, shuffle=True, generator=generator)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    drawn = generator.get_state()

    global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, progress=False)

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(generator.get_state(), drawn)


def test_everything_is_given_back_after_an_error(data):
    model = trained(normed(), data)
    state = torch.get_rng_state()
    broken = TensorDataset(data.tensors[0].clone(), data.tensors[1])
    broken.tensors[0][[7, 41]] = torch.nan
    with pytest.raises(FloatingPointError, match=r"losses of 2 samples.*indices 7, 41\)"):
        weights_of(model, broken, batch_size=N)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_attached_criterion_is_not_disturbed(model, data):
    from irw_optim import IRWOptimizer

    criterion = nn.CrossEntropyLoss()
    expected = weights_of(model, data)
    optimizer = IRWOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model, criterion=criterion
    )
    loader = DataLoader(data, batch_size=16)
    assert torch.equal(global_weights(model, criterion, loader, 0.2, progress=False), expected)
    assert optimizer.last_step is None


def test_batch_statistics_in_eval_mode_are_warned_of(data, caplog):
    layers = nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    with caplog.at_level(logging.WARNING, logger="irw_optim"):
        weights_of(model, data)
        weights_of(model, data)
    assert caplog.text.count("1 (BatchNorm1d) has no running statistics") == 1


# Batches of another shape ---------------------------------------------------------------------


class Named(Dataset):
    """Samples as dictionaries."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {"x": x, "y": y}


def test_forward_reads_other_batches(model, data):
    loader = DataLoader(Named(data), batch_size=16)
    criterion = PerSampleLoss(
        lambda output, y: nn.functional.cross_entropy(output, y, reduction="none")
    )
    actual = global_weights(
        model,
        criterion,
        loader,
        0.2,
        progress=False,
        forward=lambda model, batch: (model(batch["x"]), batch["y"]),
    )
    assert torch.equal(actual, weights_of(model, data))


def test_other_batches_without_forward_are_refused(model, data):
    with pytest.raises(TypeError, match=r"no pairs \(inputs, target\) but a dict of 2.*forward="):
        weights_of(model, Named(data))


# Refusals -------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def test_iterable_data_sets_are_refused_by_name(model):
    with pytest.raises(TypeError, match=r"iterable \(Stream\).*map-style.*local scheme"):
        global_weights(model, nn.CrossEntropyLoss(), DataLoader(Stream()), 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": None}, r"batch_size=None.*DataLoader\(dataset, batch_size=64\)"),
        ({"sampler": SubsetRandomSampler([1, 2])}, r"draws 2 of the 53 samples.*Subset\("),
    ],
    ids=["no batches", "subset"],
)
def test_loaders_that_do_not_fit_are_refused(arguments, message, model, data):
    with pytest.raises(ValueError, match=message):
        global_weights(model, nn.CrossEntropyLoss(), DataLoader(data, **arguments), 0.2)


def test_what_is_no_loader_is_refused(model):
    with pytest.raises(TypeError, match=r"loader=\[\]: expected a torch.utils.data.DataLoader"):
        global_weights(model, nn.CrossEntropyLoss(), [], 0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"center": -1.0}, "center=-1.0"),
        ({"mix": 2.0}, "mix=2.0"),
        ({"outlier_block": 0}, "outlier_block=0"),
        ({"engine": "magic"}, "engine='magic'"),
        (
            {"engine": "grad_sample"},
            "engine='grad_sample': expected one of 'auto', 'ghost', 'autodiff'",
        ),
        ({"score_parameters": ["nowhere"]}, "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_options_are_refused(options, message, model, data):
    with pytest.raises(ValueError, match=message):
        weights_of(model, data, **options)
    assert not any(m._forward_hooks for m in model.modules())


def test_an_empty_data_set_is_refused(model):
    empty = TensorDataset(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="dataset is empty"):
        weights_of(model, empty, shuffle=False)


def test_class_balance_needs_labels(model, data):
    loader = DataLoader(data, batch_size=16)
    criterion = PerSampleLoss(lambda output, y: output.square().sum(1))
    with pytest.raises(ValueError, match="class_balance=True needs one class label"):
        global_weights(model, criterion, loader, 0.2, progress=False, class_balance=True)


def test_a_collate_fn_that_drops_samples_is_refused(model, data):
    collate = torch.utils.data.default_collate
    loader = DataLoader(data, batch_size=16, collate_fn=lambda samples: collate(samples[1:]))
    with pytest.raises(ValueError, match="27 samples of the data set gave 26 losses"):
        global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, progress=False)


# Progress -------------------------------------------------------------------------------------


def test_progress_writes_nothing_where_nobody_watches(model, data, capsys):
    loader = DataLoader(data, batch_size=16)
    global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, progress=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_does_not_need_tqdm(model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    loader = DataLoader(data, batch_size=16)
    weights = global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, progress=True)
    assert len(weights) == N


def test_progress_is_complete_at_the_end(model, data, monkeypatch):
    std = pytest.importorskip("tqdm.std", reason="bars need the report extra")
    made = []

    class Bar(std.tqdm):
        def __init__(self, **given):
            super().__init__(**given | {"disable": False})
            made.append(self)

    monkeypatch.setattr(std, "tqdm", Bar)
    loader = DataLoader(data, batch_size=16)
    for center in (0.0, 1.0):
        global_weights(model, nn.CrossEntropyLoss(), loader, 0.2, center=center)
        assert made[-1].n == made[-1].total > 0


def test_a_flag_is_true_or_false(model, data):
    with pytest.raises(TypeError, match="class_balance='no': expected True or False"):
        weights_of(model, data, class_balance="no")


def test_numbers_may_be_numpys(model, data):
    same = {"center": 1.0, "mix": 0.5, "class_balance": True}
    as_numpy = {name: np.asarray(value)[()] for name, value in same.items()}
    assert torch.equal(weights_of(model, data, **as_numpy), weights_of(model, data, **same))
