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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import IRWDPConfig

_QUANTILE_RANGE = (1e-6, 1e6)


@dataclass(frozen=True)
class NoiseScales:
    """The noise of the single releases, as standard deviations: the first two per unit of C."""

    gradient: float  # sigma_g
    direction: float  # sigma_v; infinite (nothing is released) without a direction
    count: float  # sigma_b


def noise_scales(noise_multiplier: float, config: IRWDPConfig) -> NoiseScales:
    """Split one step's sigma over its releases: sigma_g = sigma / sqrt(r_g), likewise sigma_v.

    The sensitivity of a count is 1/2, and sigma_b = sigma / (2 sqrt(r_b)).
    """
    direction = math.inf
    if config.uses_direction:
        direction = noise_multiplier / math.sqrt(config.direction_share)
    return NoiseScales(
        gradient=noise_multiplier / math.sqrt(config.gradient_share),
        direction=direction,
        count=0.5 * noise_multiplier / math.sqrt(config.count_share),
    )


@dataclass(frozen=True)
class PublicState:
    """What earlier noisy releases say; anyone may see it.

    Attributes:
        threshold: tau, the loss above which a sample counts as worst-off.
        scale: kappa, the alignment that earns full weight.
        direction: v by parameter, in units of C; empty means 0.
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


class SampleTerms(NamedTuple):
    """How each sample of a physical batch enters the sums: all of shape (B,), all private.

    A sample whose loss or gradient is not finite is zero in all of them, and in the counts.
    """

    clip: Tensor  # min(1, C / |g_i|)
    tail: Tensor  # m_i, as 0.0 or 1.0
    saturated: Tensor  # k_i, as 0.0 or 1.0
    weights: Tensor  # w_i in [0, 1]
    counted: Tensor  # 0.0 for the ones that are not finite, 1.0 for all others

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

    Of shape (B,): the losses l_i, the norms |g_i|, the products <g_i, v> before clipping.
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


class Released(NamedTuple):
    """The noisy sums of one logical batch that move the public state; public themselves."""

    tail_count: float  # A
    saturated_count: float | None = None  # K; None without a direction
    direction: Mapping[Tensor, Tensor] | None = None  # T by parameter; None without a direction


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

    B is ``expected_batch_size``: the actual batch size is private.
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


def dump(state: PublicState, config: IRWDPConfig, parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Plain numbers and tensors; the state of the noise generator would give the noise away."""
    return {
        "config": asdict(config),
        "threshold": state.threshold,
        "scale": state.scale,
        "steps": state.steps,
        "direction": [state.direction.get(p) for p in parameters],
    }


def restore(saved: Any, config: IRWDPConfig, parameters: Sequence[Tensor]) -> PublicState:
    """The state that `dump` saved; ValueError for other DP-IRW parameters or another model."""
    if saved is None:
        raise ValueError(
            "state_dict has no 'irw_dp' entry: it was not saved by an IRWDPOptimizer, so threshold "
            "and direction are missing"
        )
    differing = [
        f"{name}={value!r} here, {saved['config'].get(name)!r} saved"
        for name, value in asdict(config).items()
        if saved["config"].get(name) != value
    ]
    if differing:
        raise ValueError(
            f"state_dict was saved with other DP-IRW parameters ({'; '.join(differing)}): expected "
            "the same IRWDPConfig"
        )
    directions = saved["direction"]
    shapes = [None if v is None else v.shape for v in directions]
    wanted = [p.shape for p in parameters]
    fits = len(shapes) == len(wanted) and all(
        shape in (None, like) for shape, like in zip(shapes, wanted, strict=True)
    )
    if not fits:
        raise ValueError(
            f"state_dict's direction has tensors of shapes {shapes} but the parameters have "
            f"{wanted}: expected the same model"
        )
    return PublicState(
        threshold=saved["threshold"],
        scale=saved["scale"],
        steps=saved["steps"],
        direction={
            p: v.to(device=p.device, copy=True)
            for p, v in zip(parameters, directions, strict=True)
            if v is not None
        },
    )
