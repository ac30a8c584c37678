"""The mechanism of DP-IRW as pure functions: one pass over the batch, one Gaussian.

What weighs a sample (threshold tau, scale kappa, direction v) comes only from EARLIER noisy
releases, so the weight of a sample is a function of that sample and of public state::

    c_i = g_i min(1, C / |g_i|)
    m_i = 1[l_i > tau]      s_i = <c_i, v> / C      k_i = 1[s_i > kappa]
    w_i = floor + (1 - floor) max(tail_weight m_i, clip(s_i / kappa, 0, 1))      in [0, 1]

    gradient   sum_i w_i c_i       + N(0, sigma_g^2 C^2 I)      -> the step, and
    direction  sum_i m_i c_i       + N(0, sigma_v^2 C^2 I)      -> the next v
    counts     sum_i (m_i - 1/2)   + N(0, sigma_b^2)            -> the next tau
               sum_i (k_i - 1/2)   + N(0, sigma_b^2)            -> the next kappa

Why it is private: in units of its noise a sample moves the release by

    z_i = (w_i c_i / (sigma_g C), m_i c_i / (sigma_v C), (m_i - 1/2)/sigma_b, (k_i - 1/2)/sigma_b)

    |z_i|^2 <= 1/sigma_g^2 + 1/sigma_v^2 + 2 / (4 sigma_b^2) = 1/sigma^2

whatever the other samples are. Over a Poisson batch that is the sampled Gaussian mechanism with
noise multiplier sigma (Mironov, Talwar and Zhang, 2019), and steps compose adaptively. Centring the
counts halves their sensitivity (Andrew et al., 2021, Theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import IRWDPConfig

__all__ = [
    "NoiseScales",
    "PublicState",
    "Released",
    "SampleTerms",
    "next_state",
    "noise_scales",
    "sample_terms",
]

_QUANTILE_RANGE = (1e-6, 1e6)


@dataclass(frozen=True)
class NoiseScales:
    """Noise multipliers of the single releases: noise standard deviation per unit of sensitivity.

    Attributes:
        gradient: sigma_g; the noise on each coordinate is sigma_g C.
        direction: sigma_v; infinite (nothing is released) without a direction.
        count: sigma_b; the noise on a count is sigma_b, its sensitivity being 1/2.
    """

    gradient: float
    direction: float
    count: float


def noise_scales(noise_multiplier: float, config: IRWDPConfig) -> NoiseScales:
    """Split one step's noise multiplier sigma over its releases (each formula above, solved).

    Args:
        noise_multiplier: sigma of the whole step, the one that the accountant sees.
        config: the shares r_g, r_v, r_b.

    Returns:
        sigma_g = sigma / sqrt(r_g), sigma_v = sigma / sqrt(r_v), sigma_b = sigma / (2 sqrt(r_b)).

    Example:
        >>> scales = noise_scales(1.0, IRWDPConfig(init_threshold=0.7))
        >>> precision = scales.gradient**-2 + scales.direction**-2 + 2 * (2 * scales.count) ** -2
        >>> round(precision, 12)  # = 1 / sigma^2
        1.0
    """
    return NoiseScales(
        gradient=noise_multiplier / math.sqrt(config.gradient_share),
        direction=(
            noise_multiplier / math.sqrt(config.direction_share)
            if config.uses_direction
            else math.inf
        ),
        count=0.5 * noise_multiplier / math.sqrt(config.count_share),
    )


@dataclass(frozen=True)
class PublicState:
    """What earlier noisy releases say; anyone may see it.

    Attributes:
        threshold: tau, the loss above which a sample counts as worst-off.
        scale: kappa, the alignment that earns full weight.
        direction: v, one tensor per parameter, in units of C; empty means 0.
        steps: logical steps released so far.
    """

    threshold: float
    scale: float
    direction: Mapping[Tensor, Tensor] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def initial(cls, config: IRWDPConfig) -> PublicState:
        """The state before any data was seen."""
        return cls(threshold=config.init_threshold, scale=config.init_scale)


@dataclass(frozen=True)
class SampleTerms:
    """How each sample of a physical batch enters the sums: all of shape (B,), all private.

    Attributes:
        clip: min(1, C / |g_i|).
        tail: m_i, as 0.0 or 1.0.
        saturated: k_i, as 0.0 or 1.0.
        weights: w_i in [0, 1].
        counted: 1.0, or 0.0 for a sample whose loss or gradient is not finite; such a sample
            is zero in all the others and in the counts.
    """

    clip: Tensor
    tail: Tensor
    saturated: Tensor
    weights: Tensor
    counted: Tensor

    @property
    def tail_count(self) -> Tensor:
        """Sum of m_i - 1/2 over the counted samples, 0-dim."""
        return (self.tail - 0.5 * self.counted).sum()

    @property
    def saturated_count(self) -> Tensor:
        """Sum of k_i - 1/2 over the counted samples, 0-dim."""
        return (self.saturated - 0.5 * self.counted).sum()


def sample_terms(
    losses: Tensor,
    norms: Tensor,
    products: Tensor,
    state: PublicState,
    config: IRWDPConfig,
    max_grad_norm: float,
) -> SampleTerms:
    """Weigh every sample by itself and by public state; element-wise, so local by construction.

    Args:
        losses: l_i, (B,).
        norms: |g_i|, (B,).
        products: <g_i, v> before clipping, (B,).
        state: tau, kappa, v and the number of steps.
        config: alpha, floor, tail_weight and so on.
        max_grad_norm: C.

    Example:
        >>> config = IRWDPConfig(init_threshold=1.0)
        >>> state = PublicState(threshold=1.0, scale=0.5, steps=1)
        >>> terms = sample_terms(
        ...     losses=torch.tensor([2.0, 0.5, 0.5, float("nan")]),
        ...     norms=torch.tensor([1.0, 1.0, 4.0, 1.0]),
        ...     products=torch.tensor([-1.0, 0.25, 4.0, 1.0]),
        ...     state=state, config=config, max_grad_norm=1.0,
        ... )
        >>> terms.weights
        tensor([1.0000, 0.5000, 1.0000, 0.0000])
        >>> terms.tail
        tensor([1., 0., 0., 0.])
    """
    finite = losses.isfinite() & norms.isfinite() & products.isfinite()
    counted = finite.to(norms.dtype)
    # Opacus' clipping: the 1e-6 guards the zero gradient and keeps |c_i| just below C.
    clip = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    alignment = clip * products / max_grad_norm
    tail = (losses > state.threshold).to(norms.dtype)
    saturated = (alignment > state.scale).to(norms.dtype)
    if state.steps < config.warmup_steps:
        weights = torch.ones_like(counted)
    else:
        ramp = (alignment / state.scale).clamp(0.0, 1.0)
        weights = config.floor + (1 - config.floor) * torch.maximum(config.tail_weight * tail, ramp)
    return SampleTerms(
        *(term.masked_fill(~finite, 0.0) for term in (clip, tail, saturated, weights, counted))
    )


@dataclass(frozen=True)
class Released:
    """The noisy sums of one logical batch that move the public state; public themselves.

    Attributes:
        tail_count: A.
        saturated_count: K; None without a direction.
        direction: T, one tensor per parameter; None without a direction.
    """

    tail_count: float
    saturated_count: float | None = None
    direction: Mapping[Tensor, Tensor] | None = None


def next_state(
    state: PublicState,
    released: Released,
    config: IRWDPConfig,
    *,
    max_grad_norm: float,
    expected_batch_size: float,
) -> PublicState:
    """Move tau, kappa and v by the noisy sums alone (post-processing: costs no privacy).

    v <- beta v + (1 - beta) T / (C alpha B);
    tau <- tau exp(eta (share above tau - alpha)); kappa likewise towards ``saturation``.

    Args:
        state: the state that the sums were taken with.
        released: the noisy sums A, K and T.
        config: alpha, saturation, momentum and step size.
        max_grad_norm: C.
        expected_batch_size: B = sampling rate times N; the actual batch size is private.

    Example:
        >>> config = IRWDPConfig(init_threshold=1.0, direction_share=0.0, quantile_lr=1.0)
        >>> half_above = Released(tail_count=0.0)  # 1/2 + A/B = 1/2, where alpha = 0.3 is wanted
        >>> state = PublicState.initial(config)
        >>> state = next_state(state, half_above, config, max_grad_norm=1, expected_batch_size=8)
        >>> round(math.log(state.threshold), 6)
        0.2
    """

    def track(quantile: float, count: float, target: float) -> float:
        share = min(1.0, max(0.0, 0.5 + count / expected_batch_size))
        moved = quantile * math.exp(config.quantile_lr * (share - target))
        return min(_QUANTILE_RANGE[1], max(_QUANTILE_RANGE[0], moved))

    scale, direction = state.scale, state.direction
    if released.direction is not None and released.saturated_count is not None:
        scale = track(scale, released.saturated_count, config.saturation)
        beta = config.direction_momentum
        unit = max_grad_norm * config.alpha * expected_batch_size
        direction = {
            p: (1 - beta) * noisy / unit + (beta * direction[p] if p in direction else 0.0)
            for p, noisy in released.direction.items()
        }
    return PublicState(
        threshold=track(state.threshold, released.tail_count, config.alpha),
        scale=scale,
        direction=direction,
        steps=state.steps + 1,
    )
