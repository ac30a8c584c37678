"""DBSCAN's noise, against scikit-learn's labels on every input that hypothesis can think of."""

import math
import sys

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from irw_optim.weighting.outliers import (
    DBSCANFilter,
    auto_eps,
    dbscan_noise,
    distances,
)

DTYPES = (torch.float32, torch.float64)


def sklearn_noise(distances, eps, min_samples):
    # scikit-learn refuses eps=0; no distance lies between 0 and the least normal double.
    eps = max(eps, sys.float_info.min)
    clusters = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed")
    return clusters.fit_predict(distances.cpu().numpy()) == -1


@st.composite
def gradients(draw, max_size=24):
    """Points of a small lattice: many duplicates, and many distances that tie."""
    shape = draw(st.tuples(st.integers(1, max_size), st.integers(1, 3)))
    width = draw(st.sampled_from((0, 1, 3, 20)))
    points = draw(arrays.arrays(np.int64, shape, elements=st.integers(-width, width)))
    return torch.from_numpy(points).to(draw(st.sampled_from(DTYPES)))


def gram_of(points):
    return points @ points.T


radii = st.sampled_from((0.0, 0.5, 1.0, math.sqrt(2), 2.0, math.sqrt(5), 3.0, 100.0))


@given(gradients(), radii, st.integers(1, 7))
@example(torch.zeros(6, 1), 0.0, 5)  # one cluster of duplicates
@example(torch.arange(6.0)[:, None], 0.5, 2)  # all noise
@example(torch.arange(6.0)[:, None], 1.0, 3)  # one chain, each at exactly eps
@example(torch.arange(4.0)[:, None], 9.0, 5)  # fewer than min_samples
@example(torch.tensor([[0.0], [0.0], [3.0]]), 0.0, 2)  # eps = 0: duplicates and one other
def test_noise_is_what_scikit_learn_labels_noise(points, eps, min_samples):
    D = distances(gram_of(points))

    noise = dbscan_noise(D, eps, min_samples)

    assert noise.dtype == torch.bool
    np.testing.assert_array_equal(noise.cpu().numpy(), sklearn_noise(D, eps, min_samples))


@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.sampled_from(DTYPES))
def test_noise_equals_scikit_learn_on_matrices_that_are_no_metric(data, size, min_samples, dtype):
    levels = st.sampled_from((0.0, 0.1, 0.2, 0.3))  # not representable: eps is rounded alike
    matrix = data.draw(arrays.arrays(np.float64, (size, size), elements=levels))
    D = torch.from_numpy(matrix).to(dtype)
    eps = data.draw(levels)

    noise = dbscan_noise(D, eps, min_samples)

    np.testing.assert_array_equal(noise.cpu().numpy(), sklearn_noise(D, eps, min_samples))


def test_noise_equals_scikit_learn_on_clusters_with_scattered_points():
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        centres = 6 * torch.randn(3, 5, generator=generator)
        points = centres[torch.randint(3, (64,), generator=generator)]
        points = points + torch.randn(64, 5, generator=generator)
        D = distances(gram_of(points))
        eps = float(D.flatten()[1 + seed])  # equal to a distance that occurs

        noise = dbscan_noise(D, eps, 5)

        np.testing.assert_array_equal(noise.cpu().numpy(), sklearn_noise(D, eps, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_at_exactly_eps_is_a_neighbour(dtype):
    D = torch.tensor([[0.0, 0.1], [0.1, 0.0]], dtype=dtype)
    assert not dbscan_noise(D, 0.1, 2).any()
    assert dbscan_noise(D, math.nextafter(0.1, 0.0) if dtype == torch.float64 else 0.0999, 2).all()


@given(gradients())
def test_distances_are_those_between_the_rows(points):
    D = distances(gram_of(points))

    expected = np.linalg.norm((points[:, None] - points).double().numpy(), axis=2)
    np.testing.assert_allclose(D.double().numpy(), expected, rtol=1e-6)
    assert (D.diagonal() == 0).all()
    assert D.dtype == points.dtype


@given(arrays.arrays(np.float32, 8, elements=st.floats(0, 2.0**125, width=32)))
def test_the_diagonal_is_exactly_zero(norms):
    D = distances(torch.from_numpy(norms).diag())
    assert (D.diagonal() == 0).all()


def test_distances_of_nearly_equal_rows_are_clamped_and_zero_on_the_diagonal():
    """A Gramian whose rounding goes both ways, as some processor's product of equal rows might."""
    units = torch.randint(-2, 3, (50, 50))
    K = 2.0**28 + 2.0**5 * (units + units.T)  # in steps of float32's own, so that all is exact
    squares = K.diagonal()[:, None] + K.diagonal() - 2 * K
    assert (squares < 0).any()  # what the clamp is for
    assert (squares > 0).any()

    D = distances(K)

    assert torch.equal(D, squares.clamp(min=0).sqrt())
    assert (D.diagonal() == 0).all()


def test_distances_of_rows_that_are_nearly_equal_are_no_more_than_rounding():
    generator = torch.Generator().manual_seed(0)
    rows = 1e3 + 1e-4 * torch.randn(50, 200, generator=generator)
    D = distances(gram_of(rows))
    assert D.isfinite().all()
    assert (D.diagonal() == 0).all()
    norm, epsilon = float(rows[0].norm()), torch.finfo(torch.float32).eps
    assert D.max() <= norm * math.sqrt(2 * 200 * epsilon)  # of sums of 200 products


@given(st.data(), st.integers(2, 12))
def test_distances_are_symmetric_where_the_product_is_not(data, size):
    """Both of a pair are core or neither is, whichever way its two products were rounded."""
    rows = torch.randn(size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K = gram_of(rows)
    steps = data.draw(arrays.arrays(np.float64, (size, size), elements=st.integers(-2, 2)))
    K = K * (1 + np.finfo(np.float64).eps * torch.from_numpy(steps).to(K.device))
    D = distances(K)
    assert torch.equal(D, D.T)


def test_a_negative_square_is_rounding_and_becomes_zero():
    assert distances(torch.tensor([[1.0, 1.5], [1.5, 1.0]])).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_raised_to_float32(dtype):
    gram = gram_of(torch.tensor([[1.0], [2.0], [4.0]])).to(dtype)
    assert distances(gram).dtype == torch.float32
    assert distances(gram).tolist() == [[0, 1, 3], [1, 0, 2], [3, 2, 0]]


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    gram = gram_of(torch.randn(64, 7, generator=generator))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distances(gram), DBSCANFilter()(gram)
    assert torch.equal(inside[0], distances(gram))
    assert torch.equal(inside[1], DBSCANFilter()(gram))


def test_no_graph_is_kept():
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert not distances(gram_of(rows)).requires_grad


@given(gradients(max_size=60), st.integers(1, 6), st.floats(0.01, 1.0))
@example(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 100])[:, None], 3, 0.95)
@example(torch.arange(20.0)[:, None] ** 2, 2, 0.95)
def test_auto_eps_bounds_the_removed_share(points, min_samples, quantile):
    D = distances(gram_of(points))
    if len(points) < min_samples:
        assert auto_eps(D, min_samples, quantile) == math.inf
        return

    noise = dbscan_noise(D, auto_eps(D, min_samples, quantile), min_samples)

    assert noise.sum() <= (1 - quantile) * len(points) + 1e-9


def test_the_linear_quantile_would_break_the_bound():
    D = distances(gram_of(torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 100])[:, None]))
    reach = D.sort(dim=1).values[:, 2]
    assert dbscan_noise(D, reach.quantile(0.95), 3).sum() == 1  # of 10, and 0.5 are allowed
    assert dbscan_noise(D, auto_eps(D, 3, 0.95), 3).sum() == 0


@given(gradients(), st.integers(1, 6), st.floats(0.01, 1.0))
def test_auto_eps_is_the_least_radius_that_makes_the_share_core(points, min_samples, quantile):
    D = distances(gram_of(points))
    if len(points) < min_samples:
        return
    eps = auto_eps(D, min_samples, quantile)

    def core_share(radius):
        return (D.le(radius).sum(1) >= min_samples).double().mean()

    assert core_share(eps) >= quantile - 1e-9
    smaller = D[D.lt(eps)]
    if len(smaller) and eps > 0:
        assert core_share(smaller.max()) < quantile


def test_auto_eps_does_not_round_up_an_exact_share():
    assert math.ceil(0.07 * 100) == 8  # the trap
    points = torch.arange(100.0)[:, None] ** 2
    reach = distances(gram_of(points)).sort(dim=1).values[:, 1].sort().values
    assert auto_eps(distances(gram_of(points)), 2, quantile=0.07) == reach[6]


def test_auto_eps_moves_with_the_scale_of_the_gradients():
    points = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points[:3] *= 30
    outliers = DBSCANFilter()(gram_of(points))
    assert outliers[:3].all()
    for scale in (2.0**-20, 2.0**20):
        assert torch.equal(DBSCANFilter()(gram_of(scale * points)), outliers)
    assert not torch.equal(DBSCANFilter(eps=5.0)(gram_of(2.0**-20 * points)), outliers)


@pytest.mark.parametrize("size", [0, 1, 4])
@pytest.mark.parametrize("eps", ["auto", 0.0, 1e9, math.inf])
def test_fewer_than_min_samples_keeps_everything(size, eps):
    outliers = DBSCANFilter(eps=eps)
    gram = gram_of(torch.arange(float(size))[:, None])
    assert outliers(gram).tolist() == [False] * size
    assert outliers.noise(gram).tolist() == [True] * size


def test_all_noise_keeps_everything_and_noise_tells():
    outliers = DBSCANFilter(eps=0.1, min_samples=2)
    gram = gram_of(torch.arange(5.0)[:, None])
    assert not outliers(gram).any()
    assert outliers.noise(gram).all()


def test_eps_zero_keeps_only_duplicates():
    gram = gram_of(torch.tensor([[1.0], [2.0], [2.0], [3.0]]))
    assert DBSCANFilter(eps=0, min_samples=2)(gram).tolist() == [True, False, False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("outliers", [DBSCANFilter(), DBSCANFilter(eps=1.0), DBSCANFilter(0.0, 1)])
def test_a_non_finite_gradient_is_named(value, outliers):
    rows = torch.ones(8, 3)
    rows[5, 0] = value
    with pytest.raises(FloatingPointError, match=r"not finite for the samples \[5\]"):
        outliers(gram_of(rows))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_product_off_the_diagonal_is_found(value):
    gram = gram_of(torch.arange(8.0)[:, None])
    gram[2, 6] = value
    with pytest.raises(FloatingPointError, match=r"not finite for the samples \[2, 6\]"):
        distances(gram)


def test_overflow_is_named_and_float64_mends_it():
    rows = torch.tensor([[1e19], [1.5e19]])
    with pytest.raises(FloatingPointError, match="overflow torch"):
        distances(gram_of(rows))
    assert distances(gram_of(rows.double()))[0, 1].item() == pytest.approx(5e18)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"eps": -1.0},
            ValueError,
            r'eps=-1.0: expected a number in \[0, inf\], in units of gradient norm, or "auto"',
        ),
        ({"eps": math.nan}, ValueError, "eps=nan: expected a number"),
        (
            {"eps": "Auto"},
            TypeError,
            r"eps='Auto': expected a number in \[0, inf\], in units of gradient norm, or \"auto\"",
        ),
        ({"eps": True}, TypeError, "eps=True: expected a number"),
        ({"eps": None}, TypeError, "eps=None: expected a number"),
        ({"min_samples": 0}, ValueError, "min_samples=0: expected a whole number >= 1"),
        ({"min_samples": 2.5}, TypeError, "min_samples=2.5: expected a whole number"),
        ({"min_samples": True}, TypeError, "min_samples=True: expected a whole number"),
        ({"quantile": 0.0}, ValueError, r"quantile=0.0: expected a number in \(0, 1\]"),
        ({"quantile": 1.5}, ValueError, r"quantile=1.5: expected a number in \(0, 1\]"),
        ({"quantile": math.nan}, ValueError, "quantile=nan"),
        ({"quantile": "0.9"}, TypeError, "quantile='0.9'"),
    ],
)
def test_impossible_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        DBSCANFilter(**arguments)


@pytest.mark.parametrize("call", [distances, DBSCANFilter()])
def test_a_gram_of_another_shape_or_type_is_named(call):
    with pytest.raises(ValueError, match=r"gram has shape \(3, 2\): expected \(B, B\)"):
        call(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"gram has shape \(3,\)"):
        call(torch.zeros(3))
    with pytest.raises(TypeError, match="expected a tensor"):
        call(np.zeros((3, 3)))


def test_filters_are_values():
    assert DBSCANFilter(0.5) == DBSCANFilter(eps=0.5)
    with pytest.raises(AttributeError):
        DBSCANFilter().eps = 1.0
    assert DBSCANFilter(np.float32(0.5), np.int64(3))(torch.eye(4)).tolist() == [False] * 4
