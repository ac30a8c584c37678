"""Every inequality of the page on convergence, on random instances and where it is an equality."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize

from benchmarks.evidence.convergence import alignment_constant
from benchmarks.evidence.logistic import Logistic, optimum, silent_share, worst_mean
from irw_optim import irw_weights, worst_off
from irw_optim.weighting import worst_off_count

LN2 = math.log(2)


def safe_step(losses, k, d, g_S, M, L):
    """A step size at which the members of S stay the worst off, and F falls.

    min(gap / (2 M |d|), <d, g_S> / (k L |d|^2)), gap = the k-th largest loss minus the next one,
    with M a bound on the norms of the gradients and L on how fast they change.
    """
    length = float(d.norm())
    if length == 0:
        return 0.0
    bound = float(d @ g_S) / (k * L * length**2)
    if k == len(losses):
        return bound
    largest = losses.topk(k + 1).values
    return min(bound, float(largest[-2] - largest[-1]) / (2 * M * length))


def two_samples():
    """At t = 0 every IRW step with k = 1, however small, raises F; and 0 is not its minimum."""
    return Logistic(torch.tensor([[-2.0, -1.0], [2.0, -1.0]]).double(), torch.ones(2).double())


def four_samples():
    """IRW with k = 1 leaves the minimum of F, ln 2 at t = 0, for t = (0, ln(2) / 2).

    There F = ln(1 + sqrt(2)): 27 % above the minimum.
    """
    x = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-5.0, 1.0], [5.0, 1.0]]).double()
    return Logistic(x, torch.ones(4).double())


@st.composite
def sizes(draw):
    size = draw(st.integers(2, 12))
    return size, draw(st.integers(1, size)), draw(st.integers(1, 4)), draw(st.integers(0, 10**6))


def problem_of(size, parameters, seed, ridge=0.0):
    torch.manual_seed(seed)
    x = torch.randn(size, parameters).double()
    return Logistic(x, 2.0 * torch.randint(0, 2, (size,)).double() - 1, ridge)


def irw(problem, theta, k):
    """Losses, S, summed gradient of S, weights and direction at a point, with k = |S|."""
    losses, G = problem.losses(theta), problem.gradients(theta)
    alpha = k / len(losses)
    S = worst_off(losses, alpha).double()
    assert S.sum() == k
    w = irw_weights(losses, G, alpha)
    return losses, S, G.T @ S, w, G.T @ w


def steepest(problem):
    """Bounds on the norm of any gradient, and on how fast it changes (without a ridge)."""
    squares = problem.x.square().sum(1).max()
    return float(squares.sqrt()), float(squares) / 4


# The problem and its solver ---------------------------------------------------------------------


def test_the_gradients_are_autograds():
    problem = problem_of(7, 3, 0, ridge=0.1)
    theta = torch.randn(3).double()
    G = problem.gradients(theta)
    assert torch.allclose(G, torch.autograd.functional.jacobian(problem.losses, theta))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_the_optimum_is_proven_and_another_solver_agrees(alpha):
    problem = problem_of(20, 3, 1, ridge=0.01)
    problem.y[:] = torch.sign(problem.x[:, 0] + 0.5 * problem.x[:, 1])
    found = optimum(problem, alpha)
    assert 0 <= found.value - found.bound < 1e-5
    assert found.value < LN2 - 0.01
    assert found.value == pytest.approx(worst_mean(problem.losses(found.theta), alpha))
    k = worst_off_count(20, alpha)

    # Rockafellar and Uryasev: minimise tau + sum(u) / k over u >= 0 and u >= l(t) - tau.
    def slack(z):
        return z[4:] - problem.losses(torch.from_numpy(z[:3])).numpy() + z[3]

    other = minimize(
        lambda z: z[3] + z[4:].sum() / k,
        np.array([0.0] * 3 + [0.0] + [1.0] * 20),
        method="SLSQP",
        bounds=[(None, None)] * 4 + [(0, None)] * 20,
        constraints={"type": "ineq", "fun": slack},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    assert slack(other.x).min() > -1e-6
    assert abs(other.fun - found.value) < 2e-5


def test_up_to_the_silent_share_the_best_model_says_nothing():
    problem = problem_of(30, 2, 3, ridge=1e-3)
    share = silent_share(problem)
    assert 0.2 < share < 0.9
    below, above = math.floor(share * 30) / 30, (math.floor(share * 30) + 2) / 30
    assert optimum(problem, below).value == pytest.approx(LN2, abs=2e-6)
    assert optimum(problem, above).value < LN2 - 1e-4


# What holds -------------------------------------------------------------------------------------


@given(sizes())
def test_the_gradient_of_s_is_a_subgradient(sizes):
    size, k, parameters, seed = sizes
    problem = problem_of(size, parameters, seed)
    here, there = 2 * torch.randn(2, parameters).double()
    losses, _, g_S, _, _ = irw(problem, here, k)
    linear = worst_mean(losses, k / size) + float(g_S @ (there - here)) / k
    assert worst_mean(problem.losses(there), k / size) >= linear - 1e-12


@given(sizes(), st.sampled_from([0.1, 1.0, 30.0]))
def test_alignment_is_bounded_below(sizes, scale):
    size, k, parameters, seed = sizes
    torch.manual_seed(seed)
    losses, G = torch.rand(size).double(), torch.randn(size, parameters).double()
    G[k:] *= scale
    losses[:k] += 1
    g_S = G[:k].sum(0)
    d = G.T @ irw_weights(losses, G, k / size)
    least = alignment_constant(size, k) * float(g_S.square().sum()) / k**2
    assert float(d @ g_S) / k >= least * (1 - 1e-9)
    assert float(d.norm()) >= alignment_constant(size, k) * float(g_S.norm()) / k * (1 - 1e-9)


@pytest.mark.parametrize(("size", "k"), [(10, 1), (10, 3), (10, 9), (7, 7)])
def test_no_larger_constant_bounds_alignment(size, k):
    others = 1 / (1 + math.sqrt(size / k))
    G = torch.tensor([1.0] * k + [others] * (size - k)).double()[:, None]
    losses = torch.arange(size, 0, -1).double()
    d, g_S = G.T @ irw_weights(losses, G, k / size), G[:k].sum(0)
    exactly = alignment_constant(size, k) * float(g_S.square().sum()) / k**2
    assert float(d @ g_S) / k == pytest.approx(exactly, rel=1e-12)
    # Moving the others either way can only help.
    for factor in (0.9, 1.1):
        moved = G.clone()
        moved[k:] *= factor
        d = moved.T @ irw_weights(losses, moved, k / size)
        assert float(d @ g_S) / k >= exactly * (1 - 1e-12)


@given(sizes())
def test_a_safe_step_lowers_the_worst_off_loss(sizes):
    size, k, parameters, seed = sizes
    problem = problem_of(size, parameters, seed)
    theta = torch.randn(parameters).double()
    losses, S, g_S, _, d = irw(problem, theta, k)
    eta = safe_step(losses, k, d, g_S, *steepest(problem))
    assume(eta > 0)
    after = problem.losses(theta - eta * d)
    before, now = worst_mean(losses, k / size), worst_mean(after, k / size)
    assert float(after @ S) / k == pytest.approx(now, abs=1e-12)  # S is still the worst off
    gain = eta / 2 * float(d @ g_S) / k
    assert gain >= eta / 2 * alignment_constant(size, k) * float(g_S.square().sum()) / k**2 - 1e-12
    assert now <= before - gain + 1e-12


def test_a_step_that_is_not_safe_can_raise_it():
    problem = problem_of(6, 2, 0)
    theta = torch.randn(2).double()
    losses, _, g_S, _, d = irw(problem, theta, 2)
    eta = safe_step(losses, 2, d, g_S, *steepest(problem))
    after = worst_mean(problem.losses(theta - 1e3 * eta * d), 2 / 6)
    assert after > worst_mean(losses, 2 / 6)


@given(sizes(), st.sampled_from([0.01, 0.3, 3.0]))
def test_the_regret_of_the_weighted_losses_is_bounded(sizes, rate):
    size, k, parameters, seed = sizes
    problem = problem_of(size, parameters, seed, ridge=0.01)
    start, point = torch.randn(2, parameters).double()
    theta, regret, squares, worst = start, 0.0, 0.0, 0.0
    at_point = problem.losses(point)
    for t in range(20):
        losses, _, _, w, d = irw(problem, theta, k)
        eta = rate / math.sqrt(t + 1)
        regret += eta * float(w @ losses - w @ at_point)
        squares += eta**2 * float(d.square().sum())
        cap = max(1.0, k * float(w.max()))
        worst = max(worst, float(w @ at_point) - cap * worst_mean(at_point, k / size))
        theta = theta - eta * d
    assert regret <= (float((start - point).square().sum()) + squares) / 2 + 1e-9
    assert worst <= 1e-12  # sum_i w_i l_i <= max(1, k max w) F, for losses that are not negative


def test_the_bound_of_the_regret_is_reached():
    """By linear losses, against the point where the steps end."""
    G = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, -1.0]]).double()
    level = torch.tensor([1.0, 0.8, 0.6]).double()
    start = theta = torch.tensor([0.2, -0.1]).double()
    weighted, squares = [], 0.0
    for _ in range(10):
        w = irw_weights(level + G @ theta, G, 1 / 3)
        weighted.append((w, float(w @ (level + G @ theta))))
        squares += 0.1**2 * float((G.T @ w).square().sum())
        theta = theta - 0.1 * (G.T @ w)
    regret = sum(0.1 * (value - float(w @ (level + G @ theta))) for w, value in weighted)
    assert regret == pytest.approx((float((start - theta).square().sum()) + squares) / 2)


@given(sizes())
def test_cvar_sees_all_that_it_should(sizes):
    """What the weights do not see is never positive with weights of 1/k on S."""
    size, k, parameters, seed = sizes
    problem = problem_of(size, parameters, seed)
    here, point = torch.randn(2, parameters).double()
    _, S, _, _, _ = irw(problem, here, k)
    at_point = problem.losses(point)
    assert float(S @ at_point) / k <= worst_mean(at_point, k / size) + 1e-12


@pytest.mark.parametrize("alpha", [1 / 3, 2 / 3])
def test_the_worst_off_of_batches_are_less_badly_off(alpha):
    losses = torch.rand(6).double()
    batches = [losses[list(batch)] for batch in itertools.combinations(range(6), 3)]
    average = sum(worst_mean(batch, alpha) for batch in batches) / len(batches)
    assert average < worst_mean(losses, alpha)


@given(sizes())
def test_with_alpha_one_the_gradient_vanishes_at_a_rate(sizes):
    size, _, parameters, seed = sizes
    problem = problem_of(size, parameters, seed, ridge=0.01)
    L = float(problem.x.square().sum(1).max()) / 4 + problem.ridge  # of every gradient
    theta = torch.randn(parameters).double()
    first = float(problem.losses(theta).mean())
    progress = squares = 0.0
    for t in range(30):
        _, _, g_S, _, d = irw(problem, theta, size)
        eta = 1 / math.sqrt(t + 1)
        progress += eta * float((g_S / size).square().sum())  # the constant is 1 at alpha = 1
        squares += eta**2 * float(d.square().sum())
        theta = theta - eta * d
    last = float(problem.losses(theta).mean())
    assert progress <= first - last + L / 2 * squares + 1e-9


@given(sizes())
def test_one_parameter_is_pushed_the_right_way(sizes):
    size, k, _, seed = sizes
    problem = problem_of(size, 1, seed)
    _, _, g_S, _, d = irw(problem, torch.randn(1).double(), k)
    assert float(d) * float(g_S) > 0


def test_one_parameter_reaches_the_optimum():
    problem = problem_of(12, 1, 4, ridge=0.05)
    best, theta = optimum(problem, 0.25), torch.tensor([2.0]).double()
    for t in range(2000):
        theta = theta - irw(problem, theta, 3)[4] / (t + 1) ** 0.75
    assert worst_mean(problem.losses(theta), 0.25) - best.value < 1e-2


# What fails -------------------------------------------------------------------------------------


def test_the_smallest_step_can_raise_the_worst_off_loss():
    problem, start = two_samples(), torch.zeros(2).double()
    losses, S, g_S, w, d = irw(problem, start, 1)
    assert S.tolist() == w.tolist() == [1, 0]
    assert d.tolist() == g_S.tolist() == [1.0, 0.5]
    for eta in np.logspace(-6, 1, 15):
        after = worst_mean(problem.losses(start - eta * d), 0.5)
        assert after >= LN2 + 0.75 * eta / 2 - 1e-12
    down = torch.tensor([0.0, 0.5]).double()  # the shortest convex combination of both gradients
    assert worst_mean(problem.losses(start - 0.1 * down), 0.5) < LN2 - 0.02
    assert safe_step(losses, 1, d, g_S, *steepest(problem)) == 0  # the two losses are equal


def test_irw_leaves_the_optimum_of_four_samples():
    problem, theta = four_samples(), torch.zeros(2).double()
    # At 0 all losses are ln 2, and half the sum of the first two gradients and of the last two
    # point in opposite directions: 0 is a subgradient, and ln 2 the minimum.
    G = problem.gradients(theta)
    assert torch.allclose(G.T @ torch.tensor([1.0, 1.0, 1.0, 1.0]).double(), theta)
    end = torch.tensor([0.0, LN2 / 2]).double()
    for t in range(3000):
        theta = theta - irw(problem, theta, 1)[4] / (t + 1) ** 0.8
    assert torch.allclose(theta, end, atol=1e-2)
    value = worst_mean(problem.losses(theta), 0.25)
    assert value == pytest.approx(math.log(1 + math.sqrt(2)), abs=1e-2)
    assert value > 1.25 * LN2


def test_the_weights_balance_where_irw_ends():
    """d from either side of the kink has no component along it, and pushes towards it."""
    problem, above, below = four_samples(), LN2 / 2 + 0.1, LN2 / 2 - 0.1
    for side in (-1e-9, 1e-9):
        d = irw(problem, torch.tensor([side, LN2 / 2]).double(), 1)[4]
        assert abs(float(d[1])) < 1e-6
        assert float(d[0]) * side > 0
        assert irw(problem, torch.tensor([side, above]).double(), 1)[4][1] > 0.01
        assert irw(problem, torch.tensor([side, below]).double(), 1)[4][1] < -0.01


def test_cvar_finds_the_optimum_of_four_samples():
    problem, theta = four_samples(), torch.tensor([0.5, 0.8]).double()
    best = math.inf
    for t in range(3000):
        losses, _, g_S, _, _ = irw(problem, theta, 1)
        best = min(best, float(losses.max()))
        theta = theta - g_S / (t + 1) ** 0.75
    assert LN2 <= best < LN2 + 1e-2


def test_where_g_s_vanishes_the_step_is_a_plain_one():
    G = torch.tensor([[1.0], [-1.0], [3.0]]).double()
    losses = torch.tensor([2.0, 2.0, 1.0]).double()
    w = irw_weights(losses, G, 2 / 3)
    assert torch.allclose(w, torch.full((3,), 1 / 3).double())
    assert float(G.T @ w) == pytest.approx(1.0)  # not 0: IRW leaves this optimum of F


def test_mix_and_center_give_the_guarantee_up():
    losses = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]).double()
    G = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0], [-1.0]]).double()
    assert float(G.T @ irw_weights(losses, G, 0.2, mix=0.6)) > 0
    assert float(G.T @ irw_weights(losses, G, 0.2, mix=0.65)) < 0
    G = torch.tensor([[1.0], [2.0], [2.0], [2.0], [-1.0]]).double()
    assert float(G.T @ irw_weights(losses, G, 0.2)) > 0
    assert float(G.T @ irw_weights(losses, G, 0.2, center=1.0)) == -1.0
