"""The formulas: shares, weights, state; each against numbers worked out another way."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irw_optim.privacy import DPGuaranteeError, IRWDPConfig
from irw_optim.privacy.mechanism import (
    PublicState,
    Released,
    next_state,
    noise_scales,
    sample_terms,
)

CONFIG = IRWDPConfig(init_threshold=1.0)
SAMPLE = st.tuples(
    st.floats(0, 1e3) | st.sampled_from([math.inf, math.nan]),  # loss
    st.floats(0, 1e3) | st.sampled_from([math.inf, math.nan]),  # norm
    st.floats(-1, 1),  # cosine with the direction
)


@given(
    noise_multiplier=st.floats(0.1, 50),
    direction_share=st.floats(0, 0.5),
    count_share=st.floats(0.001, 0.2),
)
def test_the_releases_share_exactly_one_steps_budget(
    noise_multiplier, direction_share, count_share
):
    config = IRWDPConfig(
        init_threshold=1.0, direction_share=direction_share, count_share=count_share
    )
    scales = noise_scales(noise_multiplier, config)
    half = 0.5  # sensitivity of a centred count
    budget = (
        scales.gradient**-2
        + scales.direction**-2
        + config.count_releases * (half / scales.count) ** 2
    )
    assert budget == pytest.approx(noise_multiplier**-2, rel=1e-12)


@pytest.mark.parametrize("direction_share", [0.1, 0.0])
def test_shares_sum_to_one(direction_share):
    config = IRWDPConfig(init_threshold=1.0, direction_share=direction_share)
    counts = 2 if direction_share else 1
    assert config.gradient_share + direction_share + counts * config.count_share == 1


@given(
    samples=st.lists(SAMPLE, min_size=1, max_size=8),
    threshold=st.floats(0.01, 10),
    scale=st.floats(0.001, 10),
    floor=st.floats(0, 1),
    tail_weight=st.floats(0, 1),
    max_grad_norm=st.floats(0.1, 10),
    steps=st.integers(0, 2),
)
def test_terms_are_local_and_bounded_for_any_sample(
    samples, threshold, scale, floor, tail_weight, max_grad_norm, steps
):
    config = replace(CONFIG, floor=floor, tail_weight=tail_weight)
    state = PublicState(threshold, scale, steps=steps)
    losses, norms, cosines = torch.tensor(samples, dtype=torch.float64).unbind(1)
    products = norms * cosines

    def terms(rows):
        return sample_terms(losses[rows], norms[rows], products[rows], state, config, max_grad_norm)

    whole = terms(slice(None))
    assert ((whole.weights >= 0) & (whole.weights <= 1)).all()
    finite = losses.isfinite() & norms.isfinite()
    assert (whole.clip[finite] * norms[finite] <= max_grad_norm).all()
    for name in ("clip", "tail", "saturated", "weights", "counted"):
        assert (getattr(whole, name)[~finite] == 0).all()
        one_by_one = torch.cat([getattr(terms([i]), name) for i in range(len(samples))])
        assert torch.equal(getattr(whole, name), one_by_one)


def test_weights_follow_the_formula():
    config = replace(CONFIG, floor=0.2, tail_weight=0.5)
    state = PublicState(threshold=1.0, scale=0.4, steps=1)
    terms = sample_terms(
        losses=torch.tensor([0.5, 0.5, 0.5, 2.0, 2.0]).double(),
        norms=torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]).double(),
        products=torch.tensor([0.4, -0.4, 0.9, 0.1, 0.3]).double(),
        state=state,
        config=config,
        max_grad_norm=1.0,
    )
    alignment = torch.tensor([0.2, -0.4, 0.9, 0.1, 0.3]).double()  # the first is clipped by half
    ramps = [0.5, 0.0, 1.0, 0.25, 0.75]
    expected = [0.2 + 0.8 * max(m * 0.5, r) for m, r in zip([0, 0, 0, 1, 1], ramps, strict=True)]
    torch.testing.assert_close(terms.weights, torch.tensor(expected).double(), rtol=1e-5, atol=0)
    assert terms.tail.tolist() == [0, 0, 0, 1, 1]
    assert terms.saturated.tolist() == (alignment > 0.4).double().tolist()
    assert torch.stack(terms.counts()).tolist() == [2 - 5 / 2, 1 - 5 / 2]


def test_everybody_weighs_one_in_the_warm_up():
    config = replace(CONFIG, warmup_steps=2)
    zero, one = torch.zeros(3), torch.ones(3)
    for steps, weight in [(0, 1.0), (1, 1.0), (2, 0.0)]:
        state = PublicState(threshold=1.0, scale=0.1, steps=steps)
        assert (sample_terms(zero, one, zero, state, config, 1.0).weights == weight).all()


def test_the_direction_is_a_moving_average_in_units_of_the_clipping_norm():
    p = torch.zeros(2)
    config = replace(CONFIG, direction_momentum=0.25, alpha=0.5)
    state = PublicState(1.0, 0.1)
    sums = [torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])]
    for total in sums:
        released = Released(0.0, 0.0, {p: total})
        state = next_state(state, released, config, max_grad_norm=2.0, expected_batch_size=8)
    unit = 2.0 * 0.5 * 8
    expected = 0.25 * 0.75 * sums[0] / unit + 0.75 * sums[1] / unit
    torch.testing.assert_close(state.direction[p], expected)
    assert state.steps == 2


@given(count=st.floats(-1e4, 1e4), lr=st.floats(0.01, 10), batch=st.floats(1, 1e3))
def test_thresholds_track_their_quantiles(count, lr, batch):
    config = replace(CONFIG, quantile_lr=lr)
    before = PublicState(threshold=2.0, scale=0.5)
    released = Released(count, count, {})
    after = next_state(before, released, config, max_grad_norm=1.0, expected_batch_size=batch)
    share = min(max(0.5 + count / batch, 0), 1)
    for old, new, target in [
        (before.threshold, after.threshold, config.alpha),
        (before.scale, after.scale, config.saturation),
    ]:
        assert new == pytest.approx(old * math.exp(lr * (share - target)))
        assert (new > old) == (share > target) or new == pytest.approx(old)


@pytest.mark.parametrize("value", [1e-6, 1e6])
def test_thresholds_stay_in_their_range(value):
    count = -1e9 if value < 1 else 1e9
    state = PublicState(value, value)
    after = next_state(
        state, Released(count, count, {}), CONFIG, max_grad_norm=1, expected_batch_size=8
    )
    assert (after.threshold, after.scale) == (value, value)


def test_a_threshold_finds_the_quantile_of_the_losses():
    """Fed the true counts, tau settles where the share alpha lies above it."""
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3
    state = PublicState(CONFIG.init_threshold, CONFIG.init_scale)
    for _ in range(200):
        count = ((losses > state.threshold).double() - 0.5).sum().item()
        state = next_state(
            state, Released(count), CONFIG, max_grad_norm=1.0, expected_batch_size=1000
        )
    assert (losses > state.threshold).double().mean().item() == pytest.approx(0.3, abs=0.01)


def test_without_a_direction_only_the_threshold_moves():
    config = replace(CONFIG, direction_share=0.0)
    state = PublicState(config.init_threshold, config.init_scale)
    after = next_state(state, Released(3.0), config, max_grad_norm=1.0, expected_batch_size=8)
    assert after.scale == state.scale
    assert not after.direction
    assert after.threshold > state.threshold


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_threshold", 0.0),
        ("init_threshold", math.nan),
        ("alpha", 0.0),
        ("alpha", 1.0),
        ("saturation", 1.5),
        ("tail_weight", 1.01),
        ("tail_weight", -0.1),
        ("floor", 1.01),
        ("floor", -0.1),
        ("direction_share", -0.1),
        ("direction_share", 1.0),
        ("count_share", 0.0),
        ("direction_momentum", 1.0),
        ("quantile_lr", 0.0),
        ("quantile_lr", 11.0),
        ("init_scale", 0.0),
        ("warmup_steps", -1),
    ],
)
def test_a_parameter_outside_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        IRWDPConfig(**{"init_threshold": 1.0, name: value})


@pytest.mark.parametrize(("name", "value"), [("alpha", "0.3"), ("warmup_steps", 1.5)])
def test_a_parameter_of_the_wrong_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r}: expected"):
        IRWDPConfig(**{"init_threshold": 1.0, name: value})


@pytest.mark.parametrize(("direction_share", "count_share"), [(0.99, 0.006), (0.5, 0.3)])
def test_an_infeasible_noise_split_is_refused(direction_share, count_share):
    with pytest.raises(DPGuaranteeError, match=f"direction_share={direction_share} and 2 counts"):
        IRWDPConfig(init_threshold=1.0, direction_share=direction_share, count_share=count_share)


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="weigh every sample 0"):
        IRWDPConfig(init_threshold=1.0, direction_share=0.0, tail_weight=0.0)


@pytest.mark.parametrize(
    "name", ["outliers", "center", "class_balance", "weighting", "scheme", "sampler"]
)
def test_options_that_weigh_by_the_batch_are_refused_by_name(name):
    with pytest.raises(DPGuaranteeError, match=f"^{name}="):
        IRWDPConfig(init_threshold=1.0, **{name: object()})
