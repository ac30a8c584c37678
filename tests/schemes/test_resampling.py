"""ResamplingSampler: the distribution of the draws, their order, and who draws what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from irw_optim.schemes import ResamplingSampler

WEIGHTS = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])

masses = st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 1e6]), min_size=1, max_size=12).filter(any)


@given(masses, st.integers(1, 40), st.integers(0, 2**62))
def test_draws_only_samples_with_a_weight(values, number, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(values, dtype=torch.float64)
    draws = list(ResamplingSampler(weights, number, generator=generator))
    assert len(draws) == number
    assert all(values[i] > 0 for i in draws)


def test_frequencies_are_the_weights():
    number = 40_000
    draws = torch.tensor(list(ResamplingSampler(WEIGHTS * 7, number)))
    shares = draws.bincount(minlength=6) / number
    deviation = (WEIGHTS * (1 - WEIGHTS) / number).sqrt()
    assert ((shares - WEIGHTS).abs() <= 4 * deviation).all()


def test_without_replacement_the_draws_are_successive():
    weights, counts = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.zeros(4, 4)
    sampler = ResamplingSampler(weights, 2, replacement=False)
    number = 4_000
    for _ in range(number):
        first, second = sampler
        counts[first, second] += 1
    expected = weights[:, None] * weights / (1 - weights[:, None])
    expected.fill_diagonal_(0)
    deviation = (expected * (1 - expected) / number).sqrt()
    assert ((counts / number - expected).abs() <= 4 * deviation).all()


def test_a_draw_at_the_very_end_is_the_last_with_a_weight(monkeypatch):
    # (1 - 2^-53) * 3 rounds up to 3: one past the last index.
    weights = torch.tensor([1.0, 2.0, 0.0])
    sampler = ResamplingSampler(weights, 4)
    drawn = 1 - torch.full((4,), 2.0**-53, dtype=torch.float64, device="cpu")
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
    assert list(sampler) == [1, 1, 1, 1]


def test_a_draw_at_the_very_beginning_is_the_first_with_a_weight(monkeypatch):
    sampler = ResamplingSampler(torch.tensor([0.0, 1.0, 2.0]), 2)
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n, device="cpu").double())
    assert list(sampler) == [1, 1]


def test_small_weights_behind_large_ones_are_not_rounded_away(monkeypatch):
    sampler = ResamplingSampler(torch.tensor([2.0**24, 1.0]), 1)
    drawn = torch.tensor([1 - 2.0**-25], device="cpu").double()
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
    assert list(sampler) == [1]


def test_epochs_differ_and_come_back():
    sampler = ResamplingSampler(WEIGHTS, 30)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert list(ResamplingSampler(WEIGHTS, 30)) == first


def test_the_generator_gives_the_seed_and_nothing_else():
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(5)
    draws = list(ResamplingSampler(WEIGHTS, 30, generator=generator))
    torch.manual_seed(2)
    sampler = ResamplingSampler(WEIGHTS, 30, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    assert list(sampler) == draws
    assert torch.equal(torch.get_rng_state(), state)
    assert draws != list(ResamplingSampler(WEIGHTS, 30))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_draws_of_one_process(world_size, replacement):
    weights = torch.rand(50) + 0.1
    one = list(ResamplingSampler(weights, 30, replacement=replacement))
    ranks = [
        ResamplingSampler(weights, 29, replacement=replacement, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert [len(rank) for rank in ranks] == [30 // world_size] * world_size
    parts = [list(rank) for rank in ranks]
    assert [i for together in zip(*parts, strict=True) for i in together] == one


def test_new_weights_count_from_the_next_draw_on():
    sampler = ResamplingSampler(torch.tensor([1.0, 0.0, 0.0]), 10)
    draws = iter(sampler)
    before = [next(draws) for _ in range(4)]
    sampler.weights = torch.tensor([0.0, 0.0, 1.0])
    assert before + list(draws) == [0] * 4 + [2] * 6


def test_new_weights_leave_the_random_numbers_alone():
    weights = torch.rand(20)
    one, other = ResamplingSampler(weights, 10), ResamplingSampler(torch.ones(20), 10)
    straight, changed = list(one), iter(other)
    for _ in range(4):
        next(changed)
    other.weights = weights
    assert list(changed) == straight[4:]


def test_state_is_resumed():
    sampler = ResamplingSampler(WEIGHTS, 30, generator=torch.Generator().manual_seed(9))
    list(sampler)
    state = sampler.state_dict()
    expected = list(sampler)
    resumed = ResamplingSampler(torch.ones(6), 30)
    resumed.load_state_dict(state)
    assert list(resumed) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "x"}, "seed='x': expected a whole number"),
        ({"epoch": -1}, "epoch=-1: expected a whole number >= 0"),
        ({"drawn": "x"}, "drawn='x': expected whole numbers"),
        ({"drawn": torch.ones(2)}, "drawn=tensor"),
    ],
    ids=str,
)
def test_a_wrong_state_is_refused_before_anything_changes(change, message):
    sampler = ResamplingSampler(WEIGHTS, 30)
    state = ResamplingSampler(torch.ones(6), 30).state_dict() | change
    with pytest.raises((TypeError, ValueError), match=message):
        sampler.load_state_dict(state)
    assert sampler.weights.equal(WEIGHTS)
    with pytest.raises(ValueError, match="state_dict has no 'weights'"):
        sampler.load_state_dict({})
    with pytest.raises(TypeError, match="epoch='x': expected a whole number"):
        sampler.set_epoch("x")


def test_a_broken_epoch_repeats_its_draws_and_goes_on_by_the_weights_of_now():
    sampler = ResamplingSampler(torch.tensor([1.0, 0.0, 0.0]), 10)
    draws = iter(sampler)
    before = [next(draws) for _ in range(4)]
    state = sampler.state_dict()
    resumed = ResamplingSampler(torch.ones(3), 10)
    resumed.load_state_dict(state)
    resumed.weights = torch.tensor([0.0, 0.0, 1.0])
    resumed.resume_epoch()
    assert list(resumed) == before + [2] * 6
    assert resumed.epoch == 1
    assert len(set(resumed)) == 1  # the next epoch is all its own


def test_workers_do_not_change_the_draws():
    data = TensorDataset(torch.arange(6))

    def drawn(workers):
        sampler = ResamplingSampler(WEIGHTS, 24)
        loader = DataLoader(data, batch_size=4, sampler=sampler, num_workers=workers)
        return torch.cat([batch for _ in range(2) for (batch,) in loader])

    assert torch.equal(drawn(2), drawn(0))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([0.5, float("nan"), 0.5]), "1 NaN or infinite entries, the first at index 1"),
        (torch.tensor([0.5, float("inf")]), "NaN or infinite"),
        (torch.tensor([0.5, -0.5]), "negative entries, down to -0.5"),
        (torch.zeros(3), "no positive entry"),
        (torch.zeros(0), "no positive entry"),
        (torch.ones(2, 2), r"shape \(2, 2\): expected \(N,\)"),
    ],
    ids=["nan", "inf", "negative", "zero", "empty", "matrix"],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        ResamplingSampler(weights)


@pytest.mark.parametrize("weights", [[0.5, 0.5], torch.tensor([1, 2])], ids=["list", "integers"])
def test_weights_of_another_type_are_refused(weights):
    with pytest.raises(TypeError, match=r"expected a floating-point tensor of shape \(N,\)"):
        ResamplingSampler(weights)


def test_weights_of_another_data_set_are_refused():
    sampler = ResamplingSampler(WEIGHTS, 10)
    with pytest.raises(
        ValueError, match="5 entries but the data set has 6 samples: they are stale"
    ):
        sampler.weights = WEIGHTS[1:]
    assert sampler.weights.equal(WEIGHTS)
    with pytest.raises(ValueError, match="7 entries"):
        sampler.load_state_dict(ResamplingSampler(torch.ones(7)).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2.5}, "num_samples=2.5"),
        ({"rank": 1}, "rank=1, world_size=None: expected both or neither"),
        ({"world_size": 2}, "rank=None, world_size=2: expected both or neither"),
        ({"rank": "0", "world_size": 2}, "rank='0': expected a whole number"),
        ({"rank": 0.5, "world_size": 2}, "rank=0.5: expected a whole number"),
        ({"rank": 0, "world_size": 0}, "world_size=0: expected a whole number >= 1"),
        ({"generator": 3}, "generator=3: expected a torch.Generator or None"),
        ({"replacement": "x"}, "replacement='x': expected True or False"),
        ({"rank": 2, "world_size": 2}, "rank=2: expected 0 <= rank < world_size=2"),
        ({"num_samples": 4, "replacement": False}, "only 3 weights are positive"),
        ({"replacement": False}, "num_samples=6 without replacement"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ResamplingSampler(WEIGHTS, **options)
