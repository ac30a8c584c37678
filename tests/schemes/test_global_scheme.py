"""GlobalScheme: what a step does, when weights are renewed, resuming, and what is refused."""

import io

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from irw_optim import DBSCANFilter, IRWOptimizer, PerSampleLoss
from irw_optim.arguments import DPGuaranteeError
from irw_optim.schemes import GlobalScheme, IndexedDataset, ResamplingSampler, global_weights

N, BATCH = 44, 8


class Training:
    """A small training with dropout (random numbers in the loop) and the usual loop."""

    def __init__(self, seed=0, shuffle_seed=None, loader_options=None, optimizer=None, **options):
        torch.manual_seed(seed)
        x = torch.randn(N, 5, dtype=torch.float64)
        self.data = TensorDataset(x, (x[:, 0] + 0.5 * torch.randn(N) > 0).long())
        self.model = nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)
        ).double()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = IRWOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.9),
            model=self.model,
            criterion=self.criterion,
            **{"alpha": 0.25, **(optimizer or {})},
        )
        generator = None
        if shuffle_seed is not None:
            generator = torch.Generator().manual_seed(shuffle_seed)
        self.loader = DataLoader(
            self.data,
            **{"batch_size": BATCH, "shuffle": True, "generator": generator}
            | (loader_options or {}),
        )
        self.scheme = GlobalScheme(self.optimizer, self.loader, **options)

    def step(self, x, y):
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    def epochs(self, number):
        for _ in range(number):
            for x, y in self.scheme:
                self.step(x, y)

    def parameters(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def current_weights(self, **options):
        return global_weights(
            self.model, self.criterion, self.loader, 0.25, progress=False, **options
        )


def counted_renewals(monkeypatch, scheme):
    """Batches taken and steps made at each renewal."""
    seen = []
    renew = scheme.renew
    monkeypatch.setattr(
        scheme, "renew", lambda: (seen.append((scheme._batches, scheme.optimizer.steps)), renew())
    )
    return seen


# What a step does -----------------------------------------------------------------------------


def test_a_reweighted_step_is_the_weighted_sum_of_a_loop_over_the_samples():
    training = Training()
    expected = training.current_weights()
    training.model[2].p = 0.0
    parameters = list(training.model.parameters())
    seen = []
    for x, y in training.scheme:
        rows = [(training.data.tensors[0] == row).all(1).nonzero().item() for row in x]
        seen += rows
        training.optimizer.zero_grad()
        loss = training.criterion(training.model(x), y)
        loss.backward()
        losses = nn.functional.cross_entropy(training.model(x), y, reduction="none")
        G = reference.per_sample_gradients(losses, parameters)
        weights = expected[rows] / expected[rows].sum()
        record = training.optimizer.last_step
        assert reference.error(record.weights, weights) < 1e-12
        actual = torch.cat([p.grad.flatten() for p in parameters])
        assert reference.error(actual, weights @ G) < 1e-10
        assert loss.item() == pytest.approx(losses.mean().item(), abs=1e-14)
        assert torch.equal(record.worst_off, training.scheme.record.worst_off[rows])
        assert torch.equal(record.scores, training.scheme.record.scores[rows])
    assert sorted(seen) == list(range(N))


def test_a_resampled_step_is_a_plain_one_on_draws_by_the_weights():
    training = Training(use="resampling")
    training.model[2].p = 0.0
    expected = training.current_weights()
    for x, y in training.scheme:
        training.optimizer.zero_grad()
        training.criterion(training.model(x), y).backward()
        actual = [p.grad.clone() for p in training.model.parameters()]
        training.optimizer.zero_grad()
        nn.functional.cross_entropy(training.model(x), y).backward()
        for gradient, p in zip(actual, training.model.parameters(), strict=True):
            assert reference.error(gradient, p.grad) < 1e-12
        rows = training.scheme._held.indices
        assert torch.equal(training.data.tensors[0][rows], x)
        assert (expected[rows] > 0).all()
        assert training.optimizer.last_step.weights.tolist() == [1 / len(x)] * len(x)


def test_a_batch_without_weights_is_averaged_and_recorded():
    training = Training(loader_options={"shuffle": False, "batch_size": 1})
    fallbacks = []
    for x, y in training.scheme:
        training.optimizer.zero_grad()
        training.criterion(training.model(x), y).backward()
        record = training.optimizer.last_step
        assert record.weights.tolist() == [1.0]
        fallbacks.append(bool(record.fallback))
    assert fallbacks == (training.scheme.weights == 0).tolist()
    assert any(fallbacks)


def test_the_optimizers_options_hold_for_the_data_set():
    options = {"center": 1.0, "class_balance": True, "mix": 0.2, "outliers": DBSCANFilter()}
    training = Training(optimizer={**options, "score_parameters": "last"}, outlier_block=20)
    expected = training.current_weights(**options, score_parameters="last", outlier_block=20)
    assert torch.equal(training.scheme.renew().weights, expected)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_renewal_where_no_gradients_are_recorded(without):
    training = Training()
    expected = training.current_weights()
    with without():
        training.scheme.renew()
    assert torch.equal(training.scheme.weights, expected)
    training.epochs(1)


def test_cvar_weights_the_worst_off_of_the_data_set_alike():
    training = Training(optimizer={"weighting": "cvar"})
    record = training.scheme.renew()
    assert record.weights.tolist() == [1 / 11 * worst for worst in record.worst_off.tolist()]


def test_own_rules_see_the_whole_data_set():
    def smallest_norm(losses, gradients, worst_off):
        return gradients.dot(gradients.combine(torch.ones_like(losses)))

    training = Training(optimizer={"weighting": smallest_norm})
    record = training.scheme.renew()
    training.model.eval()
    losses = nn.functional.cross_entropy(
        training.model(training.data.tensors[0]), training.data.tensors[1], reduction="none"
    )
    G = reference.per_sample_gradients(losses, training.model.parameters())
    assert reference.error(record.scores, G @ G.sum(0)) < 1e-10


def test_a_rule_that_wants_the_gram_matrix_is_told_why_not():
    training = Training(optimizer={"weighting": lambda losses, rows, worst_off: rows.gram()[0]})
    with pytest.raises(RuntimeError, match=r"has 44\^2 entries"):
        training.scheme.renew()


def test_losses_given_by_hand_are_weighted_too():
    training = Training()
    for x, y in training.scheme:
        losses = nn.functional.cross_entropy(training.model(x), y, reduction="none")
        training.optimizer.zero_grad()
        training.optimizer.backward(losses)
        held = training.scheme.weights[training.scheme._held.indices]
        assert reference.error(training.optimizer.last_step.weights, held / held.sum()) < 1e-12


def test_batches_come_as_from_the_loader_itself():
    training = Training(shuffle_seed=3)
    batches = list(training.scheme)
    generator = torch.Generator().manual_seed(3)
    plain = list(DataLoader(training.data, batch_size=BATCH, shuffle=True, generator=generator))
    assert len(training.scheme) == len(plain) == len(batches) == 6
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, plain, strict=True))


def flipped(samples):
    x, y = torch.utils.data.default_collate(samples)
    return -x, y


def test_workers_and_collate_functions_are_the_loaders_own():
    options = {"num_workers": 2, "collate_fn": flipped, "drop_last": True}
    training = Training(shuffle_seed=3, loader_options=options)
    batches = list(training.scheme)
    assert [len(x) for x, _ in batches] == [BATCH] * 5
    generator = torch.Generator().manual_seed(3)
    plain = DataLoader(training.data, batch_size=BATCH, shuffle=True, generator=generator)
    for (x, _), (expected, _) in zip(batches, plain, strict=False):
        assert torch.equal(x, -expected)


# When weights are renewed ---------------------------------------------------------------------


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
@pytest.mark.parametrize(
    ("refresh", "unit", "expected"),
    [
        (1, "epochs", [0, 6, 12]),
        (2, "epochs", [0, 12]),
        (4, "steps", [0, 4, 8, 12, 16]),
        (6, "steps", [0, 6, 12]),
    ],
)
def test_weights_are_held_for_refresh(refresh, unit, expected, use, monkeypatch):
    training = Training(refresh=refresh, unit=unit, use=use)
    seen = counted_renewals(monkeypatch, training.scheme)
    training.epochs(3)
    assert seen == [(batch, batch) for batch in expected]


def test_steps_are_the_optimizers_under_accumulation(monkeypatch):
    training = Training(refresh=2, unit="steps")
    seen = counted_renewals(monkeypatch, training.scheme)
    for _ in range(2):
        for number, (x, y) in enumerate(training.scheme):
            (training.criterion(training.model(x), y) / 2).backward()
            if number % 2:
                training.optimizer.step()
                training.optimizer.zero_grad()
    assert seen == [(0, 0), (4, 2), (8, 4)]


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
def test_no_weights_are_made_in_the_warm_up(use, monkeypatch):
    training = Training(use=use, optimizer={"warmup_steps": 4})
    seen = counted_renewals(monkeypatch, training.scheme)
    uniform = []
    for x, y in training.scheme:
        training.step(x, y)
        uniform.append(training.scheme.record is None)
    assert seen == [(4, 4)]
    assert uniform == [True] * 4 + [False] * 2


def test_weights_are_those_of_the_model_at_the_renewal():
    training = Training(refresh=3, unit="steps")
    for number, (x, y) in enumerate(training.scheme):
        if number % 3 == 0:
            assert torch.equal(training.scheme.weights, training.current_weights())
        training.step(x, y)


def test_resampling_draws_by_the_new_weights_within_an_epoch(monkeypatch):
    training = Training(use="resampling", refresh=2, unit="steps")
    masses = iter([torch.eye(N)[3], torch.eye(N)[7], torch.eye(N)[9]])
    original = GlobalScheme.renew

    def renew(scheme):
        original(scheme)
        scheme._sampler.weights = next(masses)

    monkeypatch.setattr(GlobalScheme, "renew", renew)
    drawn = []
    for x, y in training.scheme:
        drawn += training.scheme._held.indices.tolist()
        training.step(x, y)
    assert drawn == [3] * 16 + [7] * 16 + [9] * 12


# A loop with a loader of its own --------------------------------------------------------------


def test_select_gives_the_weights_of_these_samples():
    training = Training(shuffle_seed=1)
    training.epochs(2)
    other = Training()
    own = torch.Generator().manual_seed(1)
    loader = DataLoader(IndexedDataset(other.data), batch_size=BATCH, shuffle=True, generator=own)
    for _ in range(2):
        for indices, (x, y) in loader:
            other.scheme.select(indices)
            other.step(x, y)
    assert torch.equal(other.parameters(), training.parameters())


@pytest.mark.parametrize("kind", [list, tuple, range, np.array, torch.tensor, torch.ByteTensor])
def test_select_takes_whole_numbers_of_any_kind(kind):
    training = Training()
    x, y = training.data[:BATCH]
    given = range(BATCH) if kind is range else kind(list(range(BATCH)))
    training.scheme.select(given)
    training.step(x, y)
    held = training.scheme.weights[:BATCH]
    assert torch.allclose(training.optimizer.last_step.weights, held / held.sum())


@pytest.mark.parametrize(
    "indices",
    [
        torch.ones(BATCH, dtype=torch.bool),
        np.ones(BATCH, dtype=bool),
        torch.arange(BATCH) + 0.9,
        torch.arange(BATCH)[:, None],
        ["a"] * BATCH,
        None,
        3,
    ],
    ids=["mask", "mask of numpy", "fractions", "column", "words", "none", "number"],
)
def test_what_are_no_indices_is_refused_at_the_call(indices):
    training = Training()
    with pytest.raises(TypeError, match=r"indices=(?s:.*): expected whole numbers of shape \(B,\)"):
        training.scheme.select(indices)
    assert training.scheme.record is None


@pytest.mark.parametrize("indices", [[0, N], [-1, 3]], ids=str)
def test_indices_of_another_data_set_are_refused(indices):
    training = Training()
    training.scheme.select(torch.tensor(indices))
    with pytest.raises(IndexError, match="44 samples: they are stale or belong to another data"):
        training.criterion(training.model(torch.zeros(2, 5).double()), torch.tensor([0, 1]))


def test_a_batch_nobody_told_of_is_refused():
    training = Training()
    x, y = training.data[:BATCH]
    with pytest.raises(RuntimeError, match=r"for batch in scheme, or call scheme.select"):
        training.criterion(training.model(x), y)


def test_a_batch_after_the_epoch_is_not_the_last_one_of_it():
    training = Training()
    training.epochs(1)
    x, y = training.data.tensors
    last = N % BATCH or BATCH
    with pytest.raises(RuntimeError, match=r"for batch in scheme, or call scheme\.select"):
        training.criterion(training.model(x[:last]), y[:last])
    training.epochs(1)


def test_a_batch_after_a_loop_that_broke_off_is_not_the_last_one_of_it():
    training = Training()
    for x, y in training.scheme:
        training.step(x, y)
        break
    with pytest.raises(RuntimeError, match=r"for batch in scheme, or call scheme\.select"):
        training.step(*training.data[:BATCH])
    x, y = next(iter(training.scheme))  # which is left in the middle, too
    training.step(x, y)
    training.step(x, y)


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
def test_a_loop_that_reads_ahead_is_told_once(use, caplog):
    training = Training(use=use, loader_options={"drop_last": True})
    next(iter(training.scheme))
    training.epochs(1)
    assert not caplog.records
    for _ in range(2):
        ahead = iter(training.scheme)
        batch = next(ahead)
        for following in ahead:
            training.step(*batch)
            batch = following
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (use == "reweighting")
    assert all("read ahead" in words and "scheme.select()" in words for words in said)


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
def test_held_weights_in_batches_of_one_sample_weigh_nothing_which_is_told(use, caplog):
    training = Training(use=use, loader_options={"batch_size": 1})
    training.epochs(1)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (use == "reweighting")
    assert all("one sample each, whose weight is 1" in words for words in said)


def test_a_batch_of_another_size_is_refused():
    training = Training()
    x, y = next(iter(training.scheme))
    with pytest.raises(ValueError, match="3 losses but 8 indices"):
        training.criterion(training.model(x[:3]), y[:3])


def test_select_is_not_for_resampling():
    with pytest.raises(RuntimeError, match="draws the batches itself"):
        Training(use="resampling").scheme.select(torch.arange(3))


# Checkpoint and resume ------------------------------------------------------------------------


def resumed_like_an_uninterrupted(stop, options):
    straight = Training(**options)
    straight.epochs(3)

    broken = Training(**options)
    saved = io.BytesIO()
    for epoch in range(3):
        for x, y in broken.scheme:
            broken.step(x, y)
            if broken.optimizer.steps == stop:
                states = {
                    "model": broken.model.state_dict(),
                    "optimizer": broken.optimizer.state_dict(),
                    "scheme": broken.scheme.state_dict(),
                    "random": torch.get_rng_state(),
                    "epoch": epoch,
                }
                torch.save(states, saved)

    shuffle_seed = options["shuffle_seed"] and 77
    resumed = Training(seed=99, **{**options, "shuffle_seed": shuffle_seed})
    resumed.data.tensors = broken.data.tensors
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    resumed.model.load_state_dict(states["model"])
    resumed.optimizer.load_state_dict(states["optimizer"])
    resumed.scheme.load_state_dict(states["scheme"])
    torch.set_rng_state(states["random"])
    resumed.epochs(3 - states["epoch"])

    assert resumed.optimizer.steps == straight.optimizer.steps
    assert torch.equal(resumed.parameters(), straight.parameters())
    assert torch.equal(resumed.scheme.weights, straight.scheme.weights)


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
@pytest.mark.parametrize("shuffle_seed", [None, 5], ids=["global numbers", "own generator"])
@pytest.mark.parametrize("stop", [1, 5, 6, 9], ids=lambda n: f"after {n}")
@pytest.mark.parametrize("refresh", [(1, "epochs"), (4, "steps")], ids=str)
def test_a_resumed_training_is_the_uninterrupted_one(use, shuffle_seed, stop, refresh):
    options = {"use": use, "shuffle_seed": shuffle_seed, "refresh": refresh[0], "unit": refresh[1]}
    resumed_like_an_uninterrupted(stop, options)


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
@pytest.mark.parametrize("stop", [3, 5], ids=["before a renewal", "after one"])
def test_batches_that_workers_were_still_at_come_again(use, stop):
    """They were drawn by the weights of before the renewal."""
    options = {"use": use, "shuffle_seed": 5, "refresh": 4, "unit": "steps"}
    loader_options = {"num_workers": 1, "prefetch_factor": 2}
    resumed_like_an_uninterrupted(stop, {**options, "loader_options": loader_options})


def test_a_resumed_epoch_boundary_begins_a_new_epoch():
    straight = Training()
    straight.epochs(3)
    broken = Training()
    broken.epochs(1)
    states = broken.scheme.state_dict(), torch.get_rng_state()
    other = Training(seed=99)
    other.data.tensors = broken.data.tensors
    other.model.load_state_dict(broken.model.state_dict())
    other.optimizer.load_state_dict(broken.optimizer.state_dict())
    other.scheme.load_state_dict(states[0])
    torch.set_rng_state(states[1])
    other.epochs(2)
    assert torch.equal(other.parameters(), straight.parameters())


def test_epochs_are_epochs_where_they_have_other_batches(monkeypatch):
    """As in another number of processes: of the two epochs that weights are held, one is over."""
    first = Training(refresh=2)
    first.epochs(1)
    other = Training(refresh=2, loader_options={"batch_size": BATCH // 2})
    other.scheme.load_state_dict(first.scheme.state_dict())
    seen = counted_renewals(monkeypatch, other.scheme)
    other.epochs(3)
    assert seen == [(6 + 11, 11)]


def test_samplers_with_a_generator_of_their_own_are_resumed():
    def training():
        data = TensorDataset(torch.zeros(N))
        generator = torch.Generator().manual_seed(4)
        options = {"shuffle": None, "sampler": RandomSampler(data, generator=generator)}
        return Training(loader_options=options)

    straight = training()
    straight.epochs(2)
    broken = training()
    for number, (x, y) in enumerate(broken.scheme):
        broken.step(x, y)
        if number == 2:
            break
    state = torch.get_rng_state()
    resumed = training()
    resumed.model.load_state_dict(broken.model.state_dict())
    resumed.optimizer.load_state_dict(broken.optimizer.state_dict())
    resumed.scheme.load_state_dict(broken.scheme.state_dict())
    torch.set_rng_state(state)
    resumed.epochs(2)
    assert torch.equal(resumed.parameters(), straight.parameters())


def test_a_loop_that_breaks_off_begins_anew():
    training = Training()
    next(iter(training.scheme))
    assert len(list(training.scheme)) == 6


def test_a_state_of_another_data_set_is_refused():
    training = Training()
    training.scheme.renew()
    state = training.scheme.state_dict()
    state["record"]["weights"] = state["record"]["weights"][1:]
    with pytest.raises(ValueError, match="43 entries but the data set has 44 samples"):
        training.scheme.load_state_dict(state)


def test_draws_of_another_data_set_are_refused_before_anything_changes():
    training = Training(use="resampling")
    state = training.scheme.state_dict() | {"batches": 5}
    state["sampler"] = {**state["sampler"], "weights": torch.ones(43)}
    with pytest.raises(ValueError, match="43 entries but the data set has 44 samples"):
        training.scheme.load_state_dict(state)
    assert training.scheme._batches == 0


def broken_off(**options):
    """A training in the middle of its first epoch."""
    training = Training(**options)
    for number, (x, y) in enumerate(training.scheme):
        training.step(x, y)
        if number == 2:
            break
    return training


@pytest.mark.parametrize("use", ["reweighting", "resampling"])
@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"loader_options": {"batch_size": BATCH // 2}}, "length=6, and here it is 11"),
        ({"loader_options": {"batch_size": BATCH + 1}}, "length=6, and here it is 5"),
        ({"shuffle_seed": 3}, "generators=0, and here it is 1"),
    ],
    ids=str,
)
def test_the_middle_of_an_epoch_goes_on_in_the_same_batches_alone(use, there, message):
    if use == "resampling" and "generators" in message:
        message = "generators="
    state = broken_off(use=use).scheme.state_dict()
    other = Training(use=use, **there)
    with pytest.raises(ValueError, match=f"middle of an epoch with .*{message}"):
        other.scheme.load_state_dict(state)
    assert other.scheme.record is None
    other.epochs(1)


def test_batches_of_another_size_are_refused_also_where_there_are_as_many():
    state = broken_off(loader_options={"batch_size": 12}).scheme.state_dict()
    with pytest.raises(ValueError, match="batch_size=12, and here it is 11"):
        Training(loader_options={"batch_size": 11}).scheme.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": {"losses": torch.zeros(5)}}, "record.'losses'. has 5 entries: expected 44"),
        ({"record": {"weights": torch.ones(5)}}, "5 entries but the data set has 44 samples"),
        ({"sampler": {"seed": "x"}}, "seed='x': expected a whole number"),
        ({"sampler": {"drawn": None}}, "drawn=None: expected whole numbers"),
        ({"loader": {"position": "x"}}, "position='x': expected a whole number"),
        ({"batches": "x"}, "batches='x': expected a whole number"),
        ({"batches": -1}, "batches=-1: expected a whole number"),
    ],
    ids=str,
)
def test_a_state_that_is_none_is_refused_before_anything_changes(change, message):
    state = broken_off(use="resampling").scheme.state_dict()
    for name, part in change.items():
        state[name] = {**state[name], **part} if isinstance(part, dict) else part
    other = Training(use="resampling")
    with pytest.raises((TypeError, ValueError), match=message):
        other.scheme.load_state_dict(state)
    assert (other.scheme.record, other.scheme._batches) == (None, 0)
    assert torch.equal(other.scheme._sampler.weights, torch.ones(N))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state_dict has no 'record': expected what state_dict"),
        (None, "state_dict=None: expected what state_dict"),
        ({**dict.fromkeys(["record", "batches", "renewed_at", "sampler"]), "loader": {}}, "loader"),
    ],
    ids=["empty", "none", "no loader"],
)
def test_what_is_no_state_is_refused(state, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Training().scheme.load_state_dict(state)


@pytest.mark.parametrize("seed", [np.int64(3), 2**70])
def test_seeds_of_any_integer_type_are_taken(seed):
    training = Training()
    drawn = []
    for _ in range(2):
        training.scheme.detach()
        training.scheme = GlobalScheme(
            training.optimizer, training.loader, use="resampling", seed=seed
        )
        drawn.append(training.scheme._sampler.seed)
    assert drawn[0] == drawn[1]


def test_a_state_of_the_other_use_is_refused():
    state = Training().scheme.state_dict()
    with pytest.raises(ValueError, match="expected one with use='resampling'"):
        Training(use="resampling").scheme.load_state_dict(state)


# Refusals, and going back ---------------------------------------------------------------------


def test_detach_gives_the_local_scheme_back():
    training = Training()
    local = training.optimizer.local_scheme
    training.epochs(1)
    training.scheme.detach()
    assert training.optimizer.scheme is local
    x, y = training.data[:5]
    training.step(x, y)
    assert int(training.optimizer.last_step.worst_off.sum()) == 2


def test_two_schemes_are_refused():
    training = Training()
    with pytest.raises(ValueError, match="has a GlobalScheme already"):
        GlobalScheme(training.optimizer, training.loader)


def test_logical_batches_are_refused():
    with pytest.raises(ValueError, match="accumulation_steps=2: held weights are renormalised"):
        Training(optimizer={"accumulation_steps": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": 0}, "refresh=0"),
        ({"refresh": "epoch"}, "refresh='epoch'"),
        ({"unit": "hours"}, "unit='hours': expected one of 'epochs', 'steps'"),
        ({"use": "magic"}, "use='magic': expected one of 'reweighting', 'resampling'"),
        ({"outlier_block": 0}, "outlier_block=0"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"seed": "x"}, "seed='x': expected a whole number"),
        ({"seed": None, "use": "resampling"}, "seed=None: expected a whole number"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"forward": 3}, "forward=3: expected"),
        ({"forward": 0}, "forward=0: expected"),
        ({"criterion": max}, "criterion=<built-in function max>"),
        ({"criterion": nn.MSELoss}, r"criterion=MSELoss is a class.*criterion=MSELoss\(\)"),
        ({"criterion": nn.MSELoss(reduction="none")}, "reduction='none'"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_anything_changes(options, message):
    training = Training()
    training.scheme.detach()
    with pytest.raises((TypeError, ValueError), match=message):
        GlobalScheme(training.optimizer, training.loader, **options)
    assert training.optimizer.scheme is training.optimizer.local_scheme


def test_a_plain_optimizer_is_refused():
    training = Training()
    with pytest.raises(TypeError, match="expected an IRWOptimizer"):
        GlobalScheme(training.optimizer.inner, training.loader)


def test_a_private_optimizer_is_refused():
    from opacus.optimizers import DPOptimizer

    training = Training()
    private = DPOptimizer(
        torch.optim.SGD(training.model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    with pytest.raises(DPGuaranteeError, match=r"void its guarantee.*IRWPrivacyEngine"):
        GlobalScheme(private, training.loader)


def test_an_optimizer_without_model_or_criterion_is_refused():
    model = nn.Linear(2, 2)
    loader = DataLoader(TensorDataset(torch.zeros(3, 2), torch.zeros(3).long()))
    bare = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2)
    with pytest.raises(ValueError, match="optimizer has no model"):
        GlobalScheme(bare, loader)
    modelled = IRWOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.2, model=model)
    with pytest.raises(ValueError, match="criterion=None"):
        GlobalScheme(modelled, loader)
    criterion = PerSampleLoss(lambda output, y: output.square().sum(1))
    assert GlobalScheme(modelled, loader, criterion=criterion).renew().weights.shape == (3,)


def test_iterable_data_sets_are_refused_by_name():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    training = Training()
    training.scheme.detach()
    with pytest.raises(TypeError, match=r"iterable \(Stream\)"):
        GlobalScheme(training.optimizer, DataLoader(Stream()))
    with pytest.raises(TypeError, match=r"iterable \(Stream\)"):
        IndexedDataset(Stream())


def test_loaders_with_an_iteration_of_their_own_are_refused():
    class Sharded(DataLoader):
        def __iter__(self):
            return super().__iter__()

    training = Training()
    training.scheme.detach()
    with pytest.raises(TypeError, match="a Sharded, which has an iteration of its own"):
        GlobalScheme(training.optimizer, Sharded(training.data))


def test_resampling_needs_a_batch_size():
    training = Training()
    training.scheme.detach()
    loader = DataLoader(training.data, batch_sampler=[[0, 1], [2]])
    with pytest.raises(ValueError, match="without a batch_size"):
        GlobalScheme(training.optimizer, loader, batch_size=4, use="resampling")


def test_processes_draw_their_share():
    class Shard(RandomSampler):
        rank, num_replicas = 1, 2

    training = Training()
    training.scheme.detach()
    loader = DataLoader(training.data, batch_size=BATCH, sampler=Shard(training.data))
    scheme = GlobalScheme(training.optimizer, loader, use="resampling")
    sampler = scheme._sampler
    assert isinstance(sampler, ResamplingSampler)
    assert (sampler.rank, sampler.world_size, len(sampler)) == (1, 2, 22)


def test_a_grown_data_set_is_noticed():
    training = Training()
    list(training.scheme)
    x, y = training.data.tensors
    training.data.tensors = torch.cat([x, x]), torch.cat([y, y])
    training.scheme.select(torch.tensor([1, 60]))
    with pytest.raises(IndexError, match=r"indices 1 to 60, but the weights.*scheme.renew\(\)"):
        training.criterion(training.model(x[:2]), y[:2])
    assert len(training.scheme.renew().weights) == 2 * N


def test_draws_of_a_grown_data_set_are_refused():
    training = Training(use="resampling")
    x, y = training.data.tensors
    training.data.tensors = torch.cat([x, x]), torch.cat([y, y])
    with pytest.raises(ValueError, match=r"88 samples, and had 44 .*make a new GlobalScheme"):
        training.scheme.renew()
    assert training.scheme.record is None


def test_indexed_data_sets_fetch_batches_where_the_inner_one_does():
    class Quick(TensorDataset):
        def __getitems__(self, indices):
            fetched.append(indices)
            return [self[i] for i in indices]

    fetched = []
    data = IndexedDataset(Quick(torch.arange(10)))
    (indices, (values,)) = next(iter(DataLoader(data, batch_size=4)))
    assert indices.tolist() == values.tolist() == [0, 1, 2, 3]
    assert fetched == [[0, 1, 2, 3]]


def test_a_data_set_that_collates_by_itself_is_refused():
    class Collating(TensorDataset):
        def __getitems__(self, indices):
            return [self[torch.tensor(indices)]]

    loader = DataLoader(IndexedDataset(Collating(torch.arange(10))), batch_size=4)
    with pytest.raises(ValueError, match="Collating returned 1 samples for 4 indices"):
        next(iter(loader))
