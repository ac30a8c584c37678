"""The public parameters of DP-IRW."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from irw_optim.errors import DPGuaranteeError

from ..arguments import real_number, whole_number


@dataclass(frozen=True, kw_only=True)
class IRWDPConfig:
    """How DP-IRW weighs a sample, and how it splits the noise budget of a step.

    All of it is public: choose it without looking at the data, or account for the tuning.

    Args:
        init_threshold: loss threshold of the first step, > 0; ``math.log(number of classes)``,
            the loss of a model that knows nothing. A public constant, never taken from the data.
        alpha: share of the samples whose loss is meant to lie above the threshold, in (0, 1).
        saturation: share of the samples whose alignment is meant to reach full weight, in (0, 1).
        tail_weight: weight of a sample above the loss threshold, in [0, 1].
        floor: least weight of any sample, in [0, 1]; 1 is DP-SGD.
        direction_share: share of the step's privacy budget for the worst-off direction, in [0, 1);
            0 turns the direction off: only the loss threshold weighs.
        count_share: share of the step's privacy budget for each noisy count.
        direction_momentum: share of the old direction kept at each step, in [0, 1).
        quantile_lr: step size of the two thresholds on the log scale, in (0, 10].
        init_scale: alignment that earns full weight at the first step, > 0.
        warmup_steps: steps at the start in which every sample weighs 1.

    Raises:
        ValueError: a parameter outside its range.
        DPGuaranteeError: shares that leave no budget for the gradient, or an option that weighs
            a sample by others (an outlier filter, say).

    Example:
        >>> import math
        >>> config = IRWDPConfig(init_threshold=math.log(10))
        >>> round(config.gradient_share, 3)
        0.89
        >>> IRWDPConfig(init_threshold=0.7, direction_share=0.995)
        Traceback (most recent call last):
        ...
        irw_optim.errors.DPGuaranteeError: direction_share=0.995 and 2 counts at
        count_share=0.005 leave -0.005 of the noise budget for the gradient: expected a positive
        rest; lower direction_share or count_share
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

    def __new__(cls, *args: Any, **options: Any) -> IRWDPConfig:
        """Name the options that cannot be private before Python calls them unknown."""
        refuse_batch_level_options(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "warmup_steps":
                number: float = whole_number(name, value, 0)
            else:
                number = real_number(name, value, *_INTERVALS[name])
            object.__setattr__(self, name, number)  # frozen for everybody else
        # Without its own direction nothing but the threshold can give a sample any weight.
        if not self.uses_direction and self.floor == self.tail_weight == 0:
            raise ValueError(
                "direction_share=0, tail_weight=0 and floor=0 weigh every sample 0: "
                "expected at least one of them above 0"
            )
        if self.gradient_share <= 0:
            raise DPGuaranteeError(
                f"direction_share={self.direction_share} and {self.count_releases} counts at "
                f"count_share={self.count_share} leave {self.gradient_share:.4g} of the noise "
                "budget for the gradient: expected a positive rest; lower direction_share or "
                "count_share"
            )

    @property
    def uses_direction(self) -> bool:
        """Whether the worst-off direction is released at all."""
        return self.direction_share > 0

    @property
    def count_releases(self) -> int:
        """Number of noisy counts a step: the tail count, and with a direction the saturated one."""
        return 2 if self.uses_direction else 1

    @property
    def gradient_share(self) -> float:
        """r_g, what the other releases leave of the step's privacy budget."""
        return 1.0 - self.direction_share - self.count_releases * self.count_share


_INTERVALS = {
    "init_threshold": ("(0, inf)", "public, such as math.log(classes)"),
    "alpha": ("(0, 1)", ""),
    "saturation": ("(0, 1)", ""),
    "tail_weight": ("[0, 1]", ""),
    "floor": ("[0, 1]", ""),
    "direction_share": ("[0, 1)", ""),
    "count_share": ("(0, 1)", ""),
    "direction_momentum": ("[0, 1)", ""),
    "quantile_lr": ("(0, 10]", ""),
    "init_scale": ("(0, inf)", ""),
}


_BATCH_LEVEL = {
    "outliers": "an outlier filter compares the samples of a batch",
    "center": "centring subtracts the mean gradient of the batch",
    "class_balance": "class balancing divides by the class counts of the batch",
    "weighting": "a weighting of the whole batch sees every sample",
    "scheme": "the global scheme weighs a sample by the whole data set",
    "sampler": "weighted resampling replaces Poisson sampling",
}


def refuse_batch_level_options(options: dict[str, Any]) -> None:
    """Raise for options of the plain IRWOptimizer that no per-sample clipping makes private."""
    for name, reason in _BATCH_LEVEL.items():
        if options.get(name) is not None:
            raise DPGuaranteeError(
                f"{name}={options[name]!r}: {reason}, so one person changes the weights of others "
                f"and the reported epsilon would be false. DP-IRW has no such option; leave {name} "
                "out"
            )
