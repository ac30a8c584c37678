"""The mechanism of DP-IRW as pure functions.

What weighs a sample (threshold tau, scale kappa, direction v) comes from EARLIER noisy releases::

    c_i = g_i min(1, C / |g_i|)
    m_i = 1[l_i > tau]      s_i = <c_i, v> / C      k_i = 1[s_i > kappa]
    w_i = floor + (1 - floor) max(tail_weight m_i, clip(s_i / kappa, 0, 1))      in [0, 1]

    gradient   sum_i w_i c_i       + N(0, sigma_g^2 C^2 I)      -> the step, and
    direction  sum_i m_i c_i       + N(0, sigma_v^2 C^2 I)      -> the next v
    counts     sum_i (m_i - 1/2)   + N(0, sigma_b^2)            -> the next tau
               sum_i (k_i - 1/2)   + N(0, sigma_b^2)            -> the next kappa

Whatever the other samples are, one moves the release by at most 1/sigma in units of its noise: a
sampled Gaussian mechanism. The page on privacy has the proof.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from irw_optim.arguments import DPGuaranteeError, real_number, whole_number


@dataclass(frozen=True, kw_only=True)
class IRWDPConfig:
    """How DP-IRW weighs a sample, and how it splits the noise budget of a step.

    All of it is public: choose it without looking at the data, or account for the tuning.

    Args:
        init_threshold: loss threshold of the first step, > 0; ``math.log(number of classes)``,
            the loss of a model that knows nothing.
        alpha: share of the samples whose loss is meant to lie above the threshold, in (0, 1).
        saturation: share of those whose alignment is meant to reach full weight, in (0, 1).
        tail_weight: weight of a sample above the threshold, in [0, 1].
        floor: least weight of any sample, in [0, 1]; 1 is DP-SGD.
        direction_share: share of the step's privacy budget for the worst-off direction, in [0, 1);
            0 turns the direction off: only the threshold weighs.
        count_share: the same for each noisy count.
        direction_momentum: share of the old direction kept at each step, in [0, 1).
        quantile_lr: step size of the two thresholds on the log scale, in (0, 10].
        init_scale: alignment that earns full weight at the first step, > 0.
        warmup_steps: steps at the start in which every sample weighs 1.

    Raises:
        ValueError: a parameter outside its range.
        DPGuaranteeError: no budget is left for the gradient, or an option weighs a sample by others
            (an outlier filter, say).

    Example:
        >>> import math
        >>> config = IRWDPConfig(init_threshold=math.log(10))
        >>> round(config.gradient_share, 3)
        0.89
    """

    init_threshold: float
    alpha: float = 0.3
    saturation: float = 0.1
    tail_weight: float = 1.0
    floor: float = 0.0
    direction_share: float = 0.1
    count_share: float = 0.005
    direction_momentum: float = 0.2
    quantile_lr: float = 0.2
    init_scale: float = 0.1
    warmup_steps: int = 1

    def __new__(cls, *args: Any, **options: Any) -> "IRWDPConfig":
        """Refuse those that cannot be private before Python calls them unknown."""
        refuse_batch_level_options(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        plain = vars(self)  # frozen for everybody else
        plain["warmup_steps"] = whole_number("warmup_steps", self.warmup_steps, 0)
        for name, interval in _INTERVALS.items():
            meaning = "public, such as math.log(classes)" if name == "init_threshold" else ""
            plain[name] = real_number(name, plain[name], interval, meaning)
        if not self.uses_direction and self.floor == self.tail_weight == 0:
            raise ValueError(
                "direction_share=0, tail_weight=0 and floor=0 weigh every sample 0: "
                "expected one of them above 0"
            )
        if self.gradient_share <= 0:
            raise DPGuaranteeError(
                f"direction_share={self.direction_share} and {self.count_releases} counts at "
                f"count_share={self.count_share} leave {self.gradient_share:.4g} of the noise "
                "budget for the gradient: expected a positive rest; lower one of them"
            )

    @property
    def uses_direction(self) -> bool:
        """Whether the worst-off direction is released."""
        return self.direction_share > 0

    @property
    def count_releases(self) -> int:
        """Noisy counts a step: of the tail, and with a direction of the saturated."""
        return 2 if self.uses_direction else 1

    @property
    def gradient_share(self) -> float:
        """r_g, what the other releases leave of the budget."""
        return 1.0 - self.direction_share - self.count_releases * self.count_share


_INTERVALS = {
    **dict.fromkeys(["alpha", "saturation", "count_share"], "(0, 1)"),
    **dict.fromkeys(["tail_weight", "floor"], "[0, 1]"),
    **dict.fromkeys(["direction_share", "direction_momentum"], "[0, 1)"),
    **dict.fromkeys(["init_threshold", "init_scale"], "(0, inf)"),
    "quantile_lr": "(0, 10]",
}


def refuse_batch_level_options(options: dict[str, Any]) -> None:
    """Raise for options of IRWOptimizer that no clipping makes private."""
    for name in ("outliers", "center", "class_balance", "weighting", "scheme", "sampler"):
        if options.get(name) is not None:
            raise DPGuaranteeError(
                f"{name}={options[name]!r} compares the samples, so one person changes the weights "
                f"of others and the reported epsilon would be false; leave {name} out"
            )


@dataclass(frozen=True)
class NoiseScales:
    """The noise of the releases, as standard deviations: the first two per unit of C."""

    gradient: float  # sigma_g
    direction: float  # sigma_v; infinite (nothing is released) without a direction
    count: float  # sigma_b


def noise_scales(noise_multiplier: float, config: IRWDPConfig) -> NoiseScales:
    """Split sigma over the releases, by their shares of the budget."""
    share = config.direction_share
    return NoiseScales(
        gradient=noise_multiplier / math.sqrt(config.gradient_share),
        direction=noise_multiplier / math.sqrt(share) if share else math.inf,
        count=0.5 * noise_multiplier / math.sqrt(config.count_share),
    )


@dataclass(frozen=True)
class PublicState:
    """What earlier noisy releases say; anyone may see it."""

    threshold: float  # tau, the loss above which a sample counts as worst-off
    scale: float  # kappa, the alignment that earns full weight
    direction: Mapping[Tensor, Tensor] = field(default_factory=dict)  # v, in units of C; empty: 0
    steps: int = 0  # logical ones, so far


@dataclass(frozen=True)
class SampleTerms:
    """How each sample enters the sums: all of shape (B,), all private."""

    clip: Tensor  # min(1, C / |g_i|)
    tail: Tensor  # m_i, as 0.0 or 1.0
    saturated: Tensor  # k_i, as 0.0 or 1.0
    weights: Tensor  # w_i in [0, 1]
    counted: Tensor  # 0.0 where loss or gradient is not finite, as then are all, else 1.0

    def counts(self) -> list[Tensor]:
        """Sums of m_i - 1/2 and of k_i - 1/2, 0-dim."""
        return [(term - 0.5 * self.counted).sum() for term in (self.tail, self.saturated)]


def sample_terms(
    losses: Tensor,
    norms: Tensor,
    products: Tensor,
    state: PublicState,
    config: IRWDPConfig,
    max_grad_norm: float,
) -> SampleTerms:
    """Weigh every sample by itself and public state; ``products`` are <g_i, v>, not clipped."""
    finite = losses.isfinite() & norms.isfinite() & products.isfinite()
    counted = finite.to(norms.dtype)
    # As Opacus clips: the 1e-6 guards the zero gradient, and keeps |c_i| below C.
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
    """The noisy sums of a logical batch that move the public state; public, too."""

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

    tau <- tau exp(eta (share above tau - alpha)), kappa likewise towards ``saturation``, and
    v <- beta v + (1 - beta) T / (C alpha B), T the direction.

    B is ``expected_batch_size``: the actual batch size is private.
    """

    def track(quantile: float, count: float, target: float) -> float:
        share = min(1.0, max(0.0, 0.5 + count / expected_batch_size))
        moved = quantile * math.exp(config.quantile_lr * (share - target))
        return min(1e6, max(1e-6, moved))

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
