"""Weights as pure functions, against a literal transcription of the method and its properties."""

import math

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from irw_optim import DBSCANFilter, irw_weights, worst_off
from irw_optim.gradients import MaterializedGradients
from irw_optim.optimizer.options import Options
from irw_optim.weighting import (
    Alignment,
    Equality,
    Membership,
    normalise,
    uniform,
    weigh,
    worst_off_count,
)

SMALL = st.integers(-3, 3)  # small whole numbers: many ties, and every product is exact
SHARES = st.fractions(0, 1, max_denominator=200).filter(bool).map(float)


@st.composite
def losses_only(draw, elements=SMALL, min_size=1):
    return torch.tensor(
        draw(st.lists(elements, min_size=min_size, max_size=40)), dtype=torch.float64
    )


@st.composite
def batches(draw, min_size=1):
    """Losses (B,) and gradients (B, P) of small whole numbers, exact in float64."""
    size, width = draw(st.tuples(st.integers(min_size, 24), st.integers(1, 4)))
    losses = draw(arrays.arrays("float64", size, elements=SMALL))
    gradients = draw(arrays.arrays("float64", (size, width), elements=SMALL))
    return torch.tensor(losses), torch.tensor(gradients)


def keep_all_but(removed):
    """An outlier filter that always names the same samples."""

    def outliers(gram):
        mask = torch.zeros(len(gram), dtype=torch.bool)
        mask[list(removed)] = True
        return mask

    return outliers


class TestWorstOff:
    @given(losses_only(), SHARES)
    def test_equals_a_stable_sort(self, losses, alpha):
        mask = worst_off(losses, alpha)
        assert mask.nonzero().flatten().tolist() == sorted(
            reference.worst_off(losses.tolist(), alpha)
        )

    @given(st.integers(1, 5000), st.integers(1, 1000))
    @example(100, 70)  # 0.07 * 100 == 7.000000000000001
    @example(3000, 900)
    def test_a_share_in_thousandths_is_exact(self, size, thousandths):
        assert worst_off_count(size, thousandths / 1000) == max(1, -(-size * thousandths // 1000))

    @pytest.mark.parametrize(
        ("size", "alpha", "count"),
        [(0, 0.5, 0), (1, 1e-9, 1), (1, 1.0, 1), (7, 1.0, 7), (64, 0.2, 13), (10, 0.1 + 0.2, 3)],
    )
    def test_count(self, size, alpha, count):
        assert worst_off_count(size, alpha) == count
        assert int(worst_off(torch.zeros(size), alpha).sum()) == count

    @given(losses_only(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0])), SHARES)
    def test_size_is_exact_for_any_losses(self, losses, alpha):
        assert int(worst_off(losses, alpha).sum()) == worst_off_count(len(losses), alpha)

    def test_all_equal_takes_the_first(self):
        assert worst_off(torch.ones(5), 0.4).tolist() == [True, True, False, False, False]

    @given(losses_only(), SHARES, st.floats(0.125, 8), st.integers(-5, 5))
    def test_increasing_maps_of_the_losses_change_nothing(self, losses, alpha, factor, shift):
        assert torch.equal(worst_off(losses, alpha), worst_off(factor * losses + shift, alpha))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes(self, dtype):
        assert worst_off(torch.tensor([1.0, 3.0, 2.0], dtype=dtype), 0.5).tolist() == [0, 1, 1]

    def test_leaves_the_graph_alone(self):
        losses = torch.rand(4, requires_grad=True)
        assert not worst_off(losses, 0.5).requires_grad


class TestIRW:
    @given(
        batches(),
        SHARES,
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from([0.0, 0.25, 1.0]),
        st.booleans(),
        st.booleans(),
        st.data(),
    )
    def test_equals_the_transcription(self, batch, alpha, center, mix, balanced, filtered, data):
        losses, gradients = batch
        samples = range(len(losses))
        labels = data.draw(
            st.lists(st.integers(0, 2), min_size=len(samples), max_size=len(samples))
        )
        removed = data.draw(st.sets(st.sampled_from(samples), max_size=len(samples) - 1))
        expected = reference.decide(
            losses,
            gradients,
            alpha,
            removed=removed if filtered else (),
            center=center,
            labels=labels if balanced else None,
            mix=mix,
        )
        actual = weigh(
            losses,
            MaterializedGradients.of(gradients),
            alpha,
            Alignment(center),
            outliers=keep_all_but(removed) if filtered else None,
            labels=torch.tensor(labels) if balanced else None,
            mix=mix,
        )
        assert actual.outliers.nonzero().flatten().tolist() == sorted(removed if filtered else ())
        assert torch.equal(actual.worst_off, expected.worst_off)
        assert reference.error(actual.scores, expected.scores) < 1e-12
        if _decided_by_rounding(expected.scores, center):
            return
        assert bool(actual.fallback) is expected.fallback
        assert reference.error(actual.weights, expected.weights) < 1e-12

    @given(batches(), SHARES)
    def test_without_options_it_is_the_papers_rule_to_the_bit(self, batch, alpha):
        losses, gradients = batch[0].float(), batch[1].float() / 4  # all sums are exact
        S = worst_off(losses, alpha).float()
        s = gradients @ (S @ gradients)
        positive = s.clamp(min=0)
        w = positive / positive.sum() if positive.sum() else torch.full_like(s, 1 / len(s))
        off = {"outliers": None, "center": 0.0, "labels": None, "mix": 0.0}
        assert torch.equal(irw_weights(losses, gradients, alpha), w)
        assert torch.equal(irw_weights(losses, gradients, alpha, **off), w)

    @given(
        batches(),
        SHARES,
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([0.0, 0.5]),
        st.booleans(),
    )
    def test_weights_are_a_distribution(self, batch, alpha, center, mix, balanced):
        losses, gradients = batch
        labels = torch.arange(len(losses)) % 3 if balanced else None
        weights = irw_weights(losses, gradients, alpha, center=center, labels=labels, mix=mix)
        assert bool((weights >= 0).all())
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)

    @given(batches(), SHARES, st.integers(-20, 20))
    def test_the_length_of_the_gradients_does_not_matter(self, batch, alpha, power):
        losses, gradients = batch
        assert torch.equal(
            irw_weights(losses, gradients, alpha),
            irw_weights(losses, gradients * 2.0**power, alpha),
        )

    @given(batches(), SHARES, st.randoms(use_true_random=False))
    def test_the_order_of_the_samples_does_not_matter(self, batch, alpha, random):
        gradients = batch[1]
        order = list(range(len(gradients)))
        random.shuffle(order)
        losses = torch.arange(len(gradients), dtype=torch.float64)  # without ties
        shuffled = irw_weights(losses[order], gradients[order], alpha)
        assert reference.error(shuffled, irw_weights(losses, gradients, alpha)[order]) < 1e-12

    @given(batches())
    def test_scores_of_the_worst_off_sum_to_the_squared_norm(self, batch):
        losses, gradients = batch
        decided = weigh(losses, MaterializedGradients.of(gradients), 0.3, Alignment())
        g_S = gradients[decided.worst_off].sum(0)
        assert float(decided.scores[decided.worst_off].sum()) == float(g_S.square().sum())
        assert bool(decided.fallback) == (not g_S.any())

    def test_a_large_loss_without_gradient_gets_no_weight(self):
        gradients = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
        weights = irw_weights(torch.tensor([9.0, 2.0, 1.0, 0.5]), gradients, 0.5)
        assert weights.tolist() == [0.0, 0.5, 0.5, 0.0]

    def test_no_gradient_in_the_worst_off_falls_back_to_uniform(self):
        decided = weigh(
            torch.tensor([2.0, 1.0]),
            MaterializedGradients.of(torch.tensor([[0.0], [1.0]])),
            0.5,
            Alignment(),
        )
        assert bool(decided.fallback)
        assert decided.weights.tolist() == [0.5, 0.5]

    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    def test_a_broken_gradient_does_not_look_like_a_uniform_batch(self, broken):
        gradients = torch.tensor([[1.0], [broken], [2.0]])
        assert not bool(irw_weights(torch.tensor([3.0, 2.0, 1.0]), gradients, 0.4).isfinite().all())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_gradients_are_scored_in_float32(self, dtype):
        # In half precision 2048 + 1 - 2048 is 0: the sign of the second score would be lost.
        gradients = torch.tensor([[1.0, 1.0, 1.0], [2048.0, 1.0, -2048.0]], dtype=dtype)
        weights = irw_weights(torch.tensor([2.0, 1.0]), gradients, 0.5)
        assert weights.tolist() == pytest.approx([0.75, 0.25])

    def test_an_empty_batch_has_empty_weights(self):
        assert irw_weights(torch.zeros(0), torch.zeros(0, 3), 0.5).shape == (0,)

    def test_one_sample_has_all_the_weight(self):
        assert irw_weights(torch.ones(1), torch.randn(1, 5), 0.01).tolist() == [1.0]

    def test_samples_all_alike_are_weighted_alike(self):
        assert irw_weights(torch.ones(4), torch.ones(4, 3), 0.25).tolist() == [0.25] * 4

    def test_any_engine_will_do(self):
        losses, gradients = torch.rand(6), torch.randn(6, 5)
        first, second = torch.zeros(2), torch.zeros(3)
        engine = MaterializedGradients({first: gradients[:, :2], second: gradients[:, 2:]})
        assert torch.allclose(
            irw_weights(losses, engine, 0.3), irw_weights(losses, gradients, 0.3), atol=1e-6
        )


def _decided_by_rounding(scores, center):
    """Whether centring left a score that is 0 but for rounding: its sign is nobody's."""
    largest = float(scores.abs().max())
    return bool(center) and bool((scores.abs() <= 1e-12 * max(1.0, largest)).any())


class TestOtherRules:
    @given(batches(), SHARES)
    def test_cvar_weighs_the_worst_off_equally(self, batch, alpha):
        losses, gradients = batch
        decided = weigh(losses, MaterializedGradients.of(gradients), alpha, Membership())
        S = reference.worst_off(losses.tolist(), alpha)
        expected = torch.tensor([i in S for i in range(len(losses))], dtype=torch.float64) / len(S)
        assert torch.allclose(decided.weights, expected)

    @given(batches(), SHARES)
    def test_uniform_is_plain_training(self, batch, alpha):
        losses, gradients = batch
        decided = weigh(losses, MaterializedGradients.of(gradients), alpha, Equality())
        assert torch.equal(decided.weights, torch.full_like(losses, 1 / len(losses)))

    def test_a_rule_of_ones_own_gets_losses_gradients_and_the_worst_off(self):
        losses, gradients = torch.rand(4), MaterializedGradients.of(torch.randn(4, 3))
        seen = []

        def by_loss(*arguments):
            seen.extend(arguments)
            return arguments[0]

        decided = weigh(losses, gradients, 0.5, by_loss)
        assert seen[0] is losses
        assert seen[1] is gradients
        assert torch.equal(seen[2], worst_off(losses, 0.5))
        assert torch.allclose(decided.weights, losses / losses.sum())

    def test_other_rules_leave_removed_samples_out_too(self):
        losses, gradients = torch.arange(6.0), MaterializedGradients.of(torch.randn(6, 3))
        for rule, expected in (
            (Membership(), [0, 0, 0, 1, 1, 0]),
            (Equality(), [1, 1, 1, 1, 1, 0]),
        ):
            decided = weigh(losses, gradients, 0.4, rule, outliers=keep_all_but([5]))
            assert decided.weights.tolist() == pytest.approx([e / sum(expected) for e in expected])


class TestNormalise:
    def test_uniform_of_nothing_is_nothing(self):
        assert uniform(torch.zeros(0)).shape == (0,)

    def test_classes_without_a_kept_sample_drop_out(self):
        mass = torch.tensor([1.0, 3.0, 5.0])
        kept, labels = torch.tensor([True, True, False]), torch.tensor([4, 4, 7])
        weights, empty = normalise(mass * kept, kept, labels)
        assert weights.tolist() == [0.25, 0.75, 0.0]
        assert not bool(empty)

    def test_labels_need_not_be_class_numbers(self):
        mass = torch.tensor([1.0, 1.0, 1.0, 1.0])
        weights, _ = normalise(mass, labels=torch.tensor([-100, -100, -100, 12345]))
        assert torch.allclose(weights, torch.tensor([1, 1, 1, 3]) / 6)


LOSSES, GRADIENTS = torch.rand(4), torch.randn(4, 3)
NO_SHARE = r"expected a number in \(0, 1\].*alpha=0\.2"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"alpha": 0}, ValueError, rf"alpha=0: {NO_SHARE}"),
        ({"alpha": -0.1}, ValueError, rf"alpha=-0\.1: {NO_SHARE}"),
        ({"alpha": 1.5}, ValueError, rf"alpha=1\.5: {NO_SHARE}"),
        ({"alpha": math.nan}, ValueError, rf"alpha=nan: {NO_SHARE}"),
        ({"alpha": math.inf}, ValueError, rf"alpha=inf: {NO_SHARE}"),
        ({"alpha": "0.2"}, TypeError, rf"alpha='0\.2': {NO_SHARE}"),
        ({"alpha": True}, TypeError, rf"alpha=True: {NO_SHARE}"),
        ({"alpha": None}, TypeError, rf"alpha=None: {NO_SHARE}"),
        ({"losses": [1.0]}, TypeError, r"losses=\[1\.0\]: expected a tensor of shape \(B,\)"),
        ({"losses": LOSSES[0]}, ValueError, r'losses has shape \(\): .*reduction="none"'),
        ({"losses": GRADIENTS}, ValueError, r"losses has shape \(4, 3\): expected \(B,\)"),
        ({"losses": torch.arange(4)}, TypeError, r"losses has dtype torch\.int64"),
        ({"losses": LOSSES[:3]}, ValueError, r"losses has 3 samples but gradients has 4"),
        ({"gradients": LOSSES}, ValueError, r"gradients has shape \(4,\): expected \(B, P\)"),
        ({"gradients": GRADIENTS.numpy()}, TypeError, r"gradients=array.*tensor of shape \(B, P\)"),
        ({"gradients": None}, TypeError, r"gradients=None: expected a tensor of shape \(B, P\)"),
        ({"outliers": 0.5}, TypeError, "outliers=0.5: expected None or a filter such as DBSCAN"),
        ({"outliers": DBSCANFilter}, TypeError, r"is a class: .* outliers=DBSCANFilter\(\)"),
        ({"center": -1}, ValueError, r"center=-1: expected a number in \[0, inf\)"),
        ({"center": math.nan}, ValueError, r"center=nan: expected a number in \[0, inf\)"),
        ({"center": math.inf}, ValueError, r"center=inf: expected a number in \[0, inf\)"),
        ({"center": "1"}, TypeError, r"center='1': expected a number"),
        ({"mix": 1.1}, ValueError, r"mix=1\.1: expected a number in \[0, 1\]"),
        ({"mix": -0.5}, ValueError, r"mix=-0\.5: expected a number in \[0, 1\]"),
        ({"mix": math.nan}, ValueError, r"mix=nan: expected a number in \[0, 1\]"),
        ({"mix": None}, TypeError, r"mix=None: expected a number"),
    ],
)
def test_bad_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=rf"(?s){message}"):
        irw_weights(**{"losses": LOSSES, "gradients": GRADIENTS, "alpha": 0.5, **arguments})


@pytest.mark.parametrize(
    ("value", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("3", TypeError)]
)
def test_a_bad_warm_up_is_named(value, kind):
    with pytest.raises(kind, match=f"warmup_steps={value!r}: expected"):
        Options(alpha=0.2, warmup_steps=value)


@pytest.mark.parametrize(
    "labels", [torch.zeros(3).long(), torch.zeros(4, 2).long(), [0, 1, 0, 1]], ids=repr
)
def test_labels_that_do_not_fit_are_named(labels):
    with pytest.raises((TypeError, ValueError), match="labels"):
        irw_weights(LOSSES, GRADIENTS, 0.5, labels=labels)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(3).bool(), torch.zeros(4), None],
    ids=["another size", "no mask", "nothing"],
)
def test_filters_that_break_their_contract_are_named(mask):
    with pytest.raises((TypeError, ValueError), match="outlier filter returned"):
        irw_weights(LOSSES, GRADIENTS, 0.5, outliers=lambda gram: mask)


def test_a_filter_that_removes_everybody_removes_nobody():
    rows = MaterializedGradients.of(GRADIENTS)
    decided = weigh(LOSSES, rows, 0.5, Alignment(), outliers=keep_all_but(range(4)))
    assert not decided.outliers.any()
    assert torch.allclose(decided.weights, irw_weights(LOSSES, GRADIENTS, 0.5))
