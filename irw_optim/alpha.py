"""The share of the smallest group, without anybody's group: alpha from randomised response.

Each person flips a coin: heads, they answer with their true group, tails, with one drawn uniformly
from all (Warner 1965; for m groups Kairouz, Bonawitz and Ramage 2016). Nobody's answer gives them
away, and the shares can still be computed::

    answers = randomized_response(groups, num_groups=2)  # each person by themselves
    survey = estimate_alpha(answers, num_groups=2)
    IRWOptimizer(..., alpha=survey.lower_bound)          # (ln 3, 0)-differentially private

Of groups with shares pi_k, answer k has the probability rho_k = p pi_k + (1 - p) / m.
"""

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincinv
from torch import Tensor

from irw_optim.arguments import real_number, whole_number

Groups: TypeAlias = Tensor | npt.ArrayLike
"""0 ... m - 1, one a person: a tensor, an array or a list."""

Vector: TypeAlias = npt.NDArray[np.float64]


class AlphaEstimate(NamedTuple):
    """What `estimate_alpha` finds.

    Attributes:
        alpha: the least of ``proportions``.
        lower_bound: the alpha to train with: no group is smaller, with probability ``confidence``.
            0 where the survey is too small to tell, or a group is empty.
        proportions: estimated share of each group; they sum to 1.
        intervals: (low, high) around each share.
        confidence: of the bound, and at least of each interval.
        responses: number of answers.
    """

    alpha: float
    lower_bound: float
    proportions: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    confidence: float
    responses: int


def randomized_response(
    groups: Groups,
    num_groups: int,
    truth_probability: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each person's answer: the true group with probability p, else one of the m at random.

    torch's generators are for simulation. Where the promise to people counts, let them flip real
    coins, or draw from the operating system.

    Args:
        groups: (N,) true groups, 0 ... m - 1.
        num_groups: m >= 2.
        truth_probability: p in [0, 1].
        generator: on the device of ``groups``.

    Returns:
        (N,) int64 on the same device.

    Raises:
        TypeError, ValueError: an argument that is impossible.

    >>> groups = torch.zeros(100_000, dtype=torch.int64)
    >>> generator = torch.Generator().manual_seed(0)
    >>> answers = randomized_response(groups, num_groups=2, generator=generator)
    >>> round((answers != groups).double().mean().item(), 2)
    0.25
    """
    num_groups = whole_number("num_groups", num_groups, 2)
    p = real_number("truth_probability", truth_probability, "[0, 1]")
    truth = _as_groups("groups", groups, num_groups)
    # float64: at 24 bits, p would be rounded to multiples of 6e-8.
    coin = torch.rand(len(truth), dtype=torch.float64, device=truth.device, generator=generator)
    drawn = torch.randint(num_groups, truth.shape, device=truth.device, generator=generator)
    return torch.where(coin < p, truth, drawn)


def privacy_of(truth_probability: float, num_groups: int) -> float:
    """The epsilon >= 0 of one answer's (epsilon, 0)-differential privacy: ln(1 + p m / (1 - p)).

    An answer has the probability p + (1 - p)/m if it is true and (1 - p)/m if not. Who is asked
    twice, with fresh coins, has spent it twice.

    Args:
        truth_probability: p in [0, 1].
        num_groups: m >= 2.

    Raises:
        TypeError, ValueError: an argument that is impossible.

    >>> round(privacy_of(0.5, num_groups=2), 6), round(math.log(3), 6)
    (1.098612, 1.098612)
    """
    num_groups = whole_number("num_groups", num_groups, 2)
    p = real_number("truth_probability", truth_probability, "[0, 1]")
    return math.inf if p == 1 else math.log1p(p * num_groups / (1 - p))


def estimate_alpha(
    responses: Groups, num_groups: int, truth_probability: float = 0.5, confidence: float = 0.95
) -> AlphaEstimate:
    """The shares of the groups, and the alpha to train with, from people's randomised answers.

    With r_k the share of answer k, (r_k - (1 - p)/m) / p is an unbiased estimate of pi_k.
    `project_onto_simplex` mends negative ones, and biases shares within a few standard errors of 0.
    The least of several estimates is biased downwards.

    The intervals are Clopper and Pearson's of Binomial(N, rho_k) through the same formula. The
    lower bound is the least of one-sided ones, so at most that of the smallest group.

    Args:
        responses: (N,) answers, N >= 1, 0 ... m - 1.
        num_groups: m >= 2, also those that nobody named. A group without members makes alpha 0:
            leave it out before people are asked.
        truth_probability: p in (0, 1], as people were told.
        confidence: in (0, 1).

    Raises:
        TypeError, ValueError: an argument that is impossible.

    >>> answers = [0] * 650 + [1] * 350
    >>> survey = estimate_alpha(answers, num_groups=2)
    >>> round(survey.alpha, 3), round(survey.lower_bound, 3)
    (0.2, 0.15)
    >>> [round(end, 3) for end in survey.intervals[1]]
    [0.141, 0.261]
    """
    num_groups = whole_number("num_groups", num_groups, 2)
    p = real_number("truth_probability", truth_probability, "(0, 1]")
    confidence = real_number("confidence", confidence, "(0, 1)")
    answers = _as_groups("responses", responses, num_groups)
    total = len(answers)
    if not total:
        raise ValueError("responses is empty: expected the answers of one person or more")

    def share_of(rho: Vector) -> Vector:
        return np.asarray((rho - (1 - p) / num_groups) / p)

    def bounds(tail: float) -> Vector:
        """(groups, 2), each wrong with probability ``tail`` at most."""
        low = betaincinv(counts.clip(min=1), total - counts + 1, tail)
        high = betaincinv(counts + 1, (total - counts).clip(min=1), 1 - tail)
        rho = [np.where(counts == 0, 0.0, low), np.where(counts == total, 1.0, high)]
        return share_of(np.stack(rho, axis=1)).clip(0, 1)

    counts = torch.bincount(answers, minlength=num_groups).cpu().numpy()
    proportions = project_onto_simplex(share_of(counts / total))
    return AlphaEstimate(
        alpha=float(proportions.min()),
        lower_bound=float(bounds(1 - confidence)[:, 0].min()),
        proportions=tuple(proportions.tolist()),
        intervals=tuple(map(tuple, bounds((1 - confidence) / 2).tolist())),
        confidence=confidence,
        responses=total,
    )


def project_onto_simplex(point: npt.ArrayLike) -> Vector:
    """The closest point to (m,) numbers, in Euclidean distance, that is >= 0 and sums to 1.

    It is max(0, v - t); sorting v tells t (Duchi, Shalev-Shwartz, Singer and Chandra 2008, fig. 1).

    >>> project_onto_simplex([0.75, 0.75, -0.5]).tolist()
    [0.5, 0.5, 0.0]
    """
    v = np.asarray(point, dtype=np.float64)
    if v.ndim != 1 or not len(v) or not np.isfinite(v).all():
        raise ValueError(f"point={point!r}: expected finite numbers, of shape (m,)")
    v = v - np.floor(v.max())
    descending = np.sort(v)[::-1]
    thresholds = (descending.cumsum() - 1) / np.arange(1, len(v) + 1)
    positive = np.flatnonzero(descending > thresholds)[-1]
    return np.asarray((v - thresholds[positive]).clip(min=0))


def _as_groups(name: str, groups: Groups, num_groups: int) -> Tensor:
    expected = f"expected whole numbers 0 ... {num_groups - 1}, one a person"
    mend = f"{name} = numpy.unique({name}, return_inverse=True)[1] numbers them"
    if np.ma.is_masked(groups):
        raise ValueError(f"{name} has masked entries: {expected}; give {name}.compressed()")
    try:
        numbers = torch.as_tensor(groups if isinstance(groups, Tensor | list) else np.array(groups))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} holds no numbers: {expected}; {mend}") from error
    if numbers.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}: {expected}, of shape (N,)")
    if len(numbers) and (numbers.is_floating_point() or numbers.is_complex()):
        raise TypeError(f"{name} has dtype {numbers.dtype}: {expected}; {mend}")
    numbers = numbers.long()
    outside = (numbers < 0) | (numbers >= num_groups)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"{name}[{first}]={int(numbers[first])} is none of num_groups={num_groups}: {expected}"
        )
    return numbers
