"""Randomised response: the likelihood ratio enumerated, the estimates simulated and enumerated."""

import functools
import itertools
import math
from collections import Counter
from fractions import Fraction

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from irw_optim.alpha import (
    estimate_alpha,
    privacy_of,
    project_onto_simplex,
    randomized_response,
)

RUNS = 2000


def response_law(group, num_groups, p):
    """P(answer | group), exactly, by going through the coin and the draw."""
    law = Counter()
    for truthful, drawn in itertools.product((True, False), range(num_groups)):
        coin = p if truthful else 1 - p
        law[group if truthful else drawn] += coin / num_groups
    return [law[answer] for answer in range(num_groups)]


@pytest.mark.parametrize("num_groups", [2, 3, 7])
@pytest.mark.parametrize("p", [Fraction(0), Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)])
def test_epsilon_is_the_largest_likelihood_ratio(num_groups, p):
    laws = [response_law(group, num_groups, p) for group in range(num_groups)]
    assert all(sum(law) == 1 for law in laws)
    worst = max(
        a / b
        for one, other in itertools.permutations(laws, 2)
        for a, b in zip(one, other, strict=True)
    )
    assert privacy_of(float(p), num_groups) == pytest.approx(math.log(worst), rel=1e-12, abs=0)


def test_epsilon_is_ln_3_at_two_groups_and_one_coin():
    assert privacy_of(0.5, 2) == pytest.approx(math.log(3), rel=1e-15)


def test_epsilon_at_the_ends():
    assert privacy_of(0.0, 5) == 0
    assert privacy_of(1.0, 5) == math.inf


@pytest.mark.parametrize(("num_groups", "p"), [(2, 0.5), (3, 0.2), (5, 0.9)])
def test_answers_follow_the_law(num_groups, p):
    people = 100_000
    generator = torch.Generator().manual_seed(0)
    for group in range(num_groups):
        truth = torch.full((people,), group)
        answers = randomized_response(truth, num_groups, p, generator)
        shares = answers.bincount(minlength=num_groups).double() / people
        law = np.array(response_law(group, num_groups, p))
        standard_errors = np.sqrt(law * (1 - law) / people)
        assert (np.abs(shares.numpy() - law) < 5 * standard_errors).all()


def test_everybody_tells_the_truth_at_probability_1_and_nobody_at_0():
    truth = torch.arange(3).repeat(20_000)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(randomized_response(truth, 3, 1.0, generator), truth)
    answers = randomized_response(truth, 3, 0.0, generator)
    assert (answers == truth).double().mean() == pytest.approx(1 / 3, abs=0.01)


def test_a_generator_makes_the_answers_repeatable():
    truth = torch.zeros(100, dtype=torch.int64)
    first, again, other = (
        randomized_response(truth, 2, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "groups",
    [[0, 1, 1], np.array([0, 1, 1], dtype=np.uint8), torch.tensor([False, True, True]), []],
    ids=["list", "array", "bool", "empty"],
)
def test_groups_may_be_any_whole_numbers(groups):
    answers = randomized_response(groups, 2, truth_probability=1.0)
    assert answers.dtype == torch.int64
    assert answers.tolist() == [int(group) for group in groups]


@functools.cache
def surveys(shares, people, p, confidence=0.95, runs=RUNS, seed=0):
    """`estimate_alpha` on ``runs`` surveys of people drawn from a population with ``shares``."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.multinomial(
        torch.tensor(shares), runs * people, replacement=True, generator=generator
    )
    answers = randomized_response(groups, len(shares), p, generator).view(runs, people)
    return [estimate_alpha(row, len(shares), p, confidence) for row in answers]


def standard_error(probability):
    return math.sqrt(probability * (1 - probability) / RUNS)


POPULATIONS = [
    ((0.8, 0.2), 500, 0.5, 0.95),
    ((0.6, 0.3, 0.1), 1000, 0.5, 0.9),
    ((0.3, 0.3, 0.2, 0.2), 1000, 0.8, 0.95),
    ((0.7, 0.3, 0.0), 600, 0.5, 0.95),  # an empty group
    ((0.97, 0.03), 60, 0.3, 0.8),  # far too few people
]


@functools.cache
def exact_coverage(share, people, num_groups, p, confidence):
    """P(the interval of a group covers its share), over every count that can come up."""
    rho = p * share + (1 - p) / num_groups
    covered = 0.0
    for count in range(people + 1):
        answers = np.repeat([0, 1], [count, people - count])
        low, high = estimate_alpha(answers, num_groups, p, confidence).intervals[0]
        covered += binom.pmf(count, people, rho) * (low <= share <= high)
    return covered


@pytest.mark.parametrize(("shares", "people", "p", "confidence"), POPULATIONS)
def test_intervals_and_bound_cover_as_promised(shares, people, p, confidence):
    results = surveys(shares, people, p, confidence)

    for group, share in enumerate(shares):
        ends = [result.intervals[group] for result in results]
        covered = np.mean([low <= share <= high for low, high in ends])
        exact = exact_coverage(share, people, len(shares), p, confidence)
        assert exact >= confidence
        assert covered == pytest.approx(exact, abs=4 * standard_error(exact) + 1e-12)
    bounded = np.mean([result.lower_bound <= min(shares) for result in results])
    assert bounded >= confidence - 4 * standard_error(confidence)


def test_the_bound_is_no_more_cautious_than_it_promises():
    """One group is clearly the smallest: then the bound fails nearly as often as it may."""
    results = surveys((0.5, 0.3, 0.2), 2000, 0.5, confidence=0.9)
    bounded = np.mean([result.lower_bound <= 0.2 for result in results])
    assert bounded == pytest.approx(0.9, abs=0.02)


def test_groups_of_a_fixed_population_are_covered_too():
    people, shares = 300, [0.7, 0.3]
    truth = torch.arange(people).ge(0.7 * people).long()
    answers = randomized_response(
        truth.repeat(RUNS), 2, 0.5, torch.Generator().manual_seed(0)
    ).view(RUNS, people)
    results = [estimate_alpha(row, 2) for row in answers]
    low, high = np.array([result.intervals[1] for result in results]).T
    assert np.mean((low <= shares[1]) & (shares[1] <= high)) >= 0.95
    assert np.mean([result.lower_bound <= 0.3 for result in results]) >= 0.95


@pytest.mark.parametrize(("shares", "people", "p", "confidence"), POPULATIONS[:3])
def test_proportions_are_unbiased_where_no_share_is_near_0(shares, people, p, confidence):
    proportions = np.array([s.proportions for s in surveys(shares, people, p, confidence)])
    error = proportions.mean(0) - shares
    assert (np.abs(error) < 4 * proportions.std(0) / math.sqrt(RUNS)).all()


def test_an_empty_group_is_overestimated_by_the_projection():
    """Half of the time its raw estimate is negative and cut: the bias that the docs tell of."""
    proportions = np.array([s.proportions for s in surveys(*POPULATIONS[3])])
    assert 0.3 < (proportions[:, 2] == 0).mean() < 0.7
    assert 0.005 < proportions[:, 2].mean() < 0.05


def test_the_estimate_of_alpha_is_biased_downwards_among_equal_groups():
    alphas = np.array([s.alpha for s in surveys((0.25,) * 4, 1000, 0.8)])
    assert alphas.mean() < 0.25 - 10 * alphas.std() / math.sqrt(RUNS)


@given(
    st.lists(st.integers(0, 300), min_size=2, max_size=5).filter(any),
    st.floats(0.05, 1.0),
    st.floats(0.5, 0.999),
)
def test_estimates_are_consistent_with_each_other(counts, p, confidence):
    survey = estimate_alpha(np.repeat(range(len(counts)), counts), len(counts), p, confidence)

    assert sum(survey.proportions) == pytest.approx(1)
    assert survey.alpha == min(survey.proportions)
    assert 0 <= survey.lower_bound <= survey.alpha + 1e-12
    assert survey.lower_bound >= min(low for low, _ in survey.intervals) - 1e-12
    assert all(0 <= low <= high <= 1 for low, high in survey.intervals)
    assert survey.responses == sum(counts)
    assert survey.confidence == confidence


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_at_full_truth_the_intervals_are_those_of_clopper_and_pearson(counted):
    count, people = counted
    survey = estimate_alpha(np.repeat([0, 1], [count, people - count]), 2, 1.0, 0.9)

    two_sided = binomtest(count, people).proportion_ci(0.9, method="exact")
    assert survey.intervals[0] == pytest.approx((two_sided.low, two_sided.high), abs=1e-9)
    bounds = [
        binomtest(k, people, alternative="greater").proportion_ci(0.9, method="exact").low
        for k in (count, people - count)
    ]
    assert survey.lower_bound == pytest.approx(min(bounds), abs=1e-9)
    assert survey.alpha == min(count, people - count) / people


def test_a_group_that_nobody_named_counts():
    survey = estimate_alpha([0] * 600 + [1] * 400, 3)
    assert survey.proportions[2] == 0
    assert survey.alpha == 0
    assert survey.lower_bound == 0
    assert survey.intervals[2] == (0, 0)  # the answer is rarer than chance alone makes it


def test_one_answer_is_enough_for_an_estimate_and_for_no_bound():
    survey = estimate_alpha([1], 2)
    assert survey.proportions == (0, 1)
    assert survey.lower_bound == 0
    assert survey.intervals == ((0, 1), (0, 1))


def test_more_people_bring_the_bound_closer_to_the_share():
    bounds = [
        estimate_alpha([0] * (65 * n) + [1] * (35 * n), 2).lower_bound for n in (1, 10, 100, 10_000)
    ]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(0.2, abs=0.002)


@given(arrays.arrays(np.float64, st.integers(1, 6), elements=st.floats(-5, 5)))
def test_the_projection_is_the_closest_point_of_the_simplex(point):
    projected = project_onto_simplex(point)

    assert (projected >= 0).all()
    assert projected.sum() == pytest.approx(1)
    # The condition of a closest point in a convex set: no vertex lies on the far side.
    vertices = np.eye(len(point))
    assert ((point - projected) @ (vertices - projected).T <= 1e-9).all()
    np.testing.assert_allclose(project_onto_simplex(projected), projected, atol=1e-12)


@pytest.mark.parametrize("far", [1e16, -1e17, 1e300])
def test_the_projection_of_a_point_that_is_far_away(far):
    """Projecting takes no notice of a number that is added to all."""
    point = np.array([far, far * (1 + 2**-40), far * (1 - 2**-40)])
    np.testing.assert_array_equal(project_onto_simplex(point), np.eye(3)[point.argmax()])


def test_answers_that_are_nearly_all_at_random_tell_no_share():
    found = estimate_alpha([0, 0, 0, 1], 2, truth_probability=1e-18)
    assert (found.alpha, found.lower_bound) == (0, 0)
    assert found.proportions == (1, 0)


@pytest.mark.parametrize("point", [[], [math.nan, 1], [math.inf], [[1.0, 2.0]], 3.0, None], ids=str)
def test_what_is_no_point_is_named(point):
    with pytest.raises(ValueError, match=r"point=.*: expected finite numbers, of shape \(m,\)"):
        project_onto_simplex(point)


def test_a_column_of_a_table_after_a_selection_is_an_array():
    pd = pytest.importorskip("pandas")
    answers = pd.Series([0, 1, 1, 0, 0, 0, 1])
    for some in (answers[answers.index > 1], answers[2:].to_numpy()[::-1]):
        assert estimate_alpha(some, 2) == estimate_alpha([1, 0, 0, 0, 1], 2)
        drawn = randomized_response(some, 2, truth_probability=1.0)
        assert drawn.tolist() == list(some)


COMMON_ERRORS = [
    ({"num_groups": 1}, ValueError, "num_groups=1: expected a whole number >= 2"),
    ({"num_groups": 2.0}, TypeError, "num_groups=2.0: expected a whole number >= 2"),
    ({"num_groups": True}, TypeError, "num_groups=True"),
    ({"truth_probability": -0.1}, ValueError, "truth_probability=-0.1: expected a number in "),
    ({"truth_probability": 1.1}, ValueError, "truth_probability=1.1: expected a number in "),
    ({"truth_probability": math.nan}, ValueError, "truth_probability=nan"),
    ({"truth_probability": "1/2"}, TypeError, "truth_probability='1/2'"),
    ({"truth_probability": True}, TypeError, "truth_probability=True"),
]
GROUP_ERRORS = [
    ([0, 2, 1], ValueError, r"\[1\]=2 is none of num_groups=2: expected whole numbers 0 ... 1"),
    ([0, 1, -1], ValueError, r"\[2\]=-1 is none of num_groups=2"),
    ([0.0, 1.0], TypeError, r"has dtype torch.float32: expected whole numbers 0 ... 1"),
    ([0.0, math.nan], TypeError, r"has dtype torch.float32"),
    (["a", "b"], TypeError, r"holds no numbers: .* numpy.unique\(\w+, return_inverse=True\)\[1\]"),
    ([0, None], TypeError, "holds no numbers"),
    (np.array(["a", "b"]), TypeError, "holds no numbers"),
    ([[0, 1]], ValueError, r"has shape \(1, 2\): expected whole numbers"),
    (1, ValueError, r"has shape \(\)"),
    (np.ma.array([0, 1], mask=[0, 1]), ValueError, "has masked entries: expected whole numbers"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), COMMON_ERRORS)
@pytest.mark.parametrize(
    ("function", "first"),
    [(randomized_response, {"groups": [0, 1]}), (estimate_alpha, {"responses": [0, 1]})],
)
def test_impossible_arguments_are_named(function, first, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{**first, "num_groups": 2, **arguments})


@pytest.mark.parametrize(("arguments", "error", "message"), COMMON_ERRORS)
def test_impossible_arguments_of_privacy_of_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        privacy_of(**{"truth_probability": 0.5, "num_groups": 2, **arguments})


@pytest.mark.parametrize(("groups", "error", "message"), GROUP_ERRORS)
def test_impossible_groups_are_named(groups, error, message):
    with pytest.raises(error, match=f"groups.*{message}"):
        randomized_response(groups, 2)
    with pytest.raises(error, match=f"responses.*{message}"):
        estimate_alpha(groups, 2)


def test_an_estimate_needs_answers_some_of_them_true():
    with pytest.raises(ValueError, match="responses is empty: expected the answers"):
        estimate_alpha([], 2)
    with pytest.raises(ValueError, match=r"truth_probability=0.0: expected a number in \(0, 1\]"):
        estimate_alpha([0, 1], 2, truth_probability=0.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1, 95, math.nan])
def test_an_impossible_confidence_is_named(confidence):
    with pytest.raises(ValueError, match=r"confidence=.*: expected a number in \(0, 1\)"):
        estimate_alpha([0, 1], 2, confidence=confidence)
