"""What values the arguments of the algorithm may have: raises with what is allowed."""

from __future__ import annotations

import math

from torch import Tensor

from irw_optim.arguments import as_real, as_whole


def check_alpha(alpha: object) -> float:
    """Return ``alpha`` as a float, or raise a ValueError that says what is allowed.

    >>> check_alpha(0.2)
    0.2
    """
    allowed = "a number in (0, 1], a lower bound on the share of the smallest group"
    if (number := as_real(alpha)) is None:
        raise TypeError(f"alpha={alpha!r}: expected {allowed}, for example alpha=0.2")
    if not 0.0 < number <= 1.0:  # false for NaN too
        raise ValueError(f"alpha={alpha!r}: expected {allowed}, for example alpha=0.2")
    return number


def check_losses(losses: object) -> None:
    """Raise unless ``losses`` is a vector of floating-point numbers."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses={losses!r}: expected a tensor of shape (B,), one loss a sample")
    if losses.ndim != 1:
        raise ValueError(
            f"losses has shape {tuple(losses.shape)}: expected (B,), one loss a sample; "
            'for example F.cross_entropy(output, target, reduction="none")'
        )
    if not losses.is_floating_point():
        raise TypeError(f"losses has dtype {losses.dtype}: expected a floating-point dtype")


def check_labels(labels: object, size: int) -> None:
    """Raise unless ``labels`` holds one whole number for each of ``size`` samples."""
    wanted = f"expected a tensor of {size} whole numbers, the class of each sample"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}: {wanted}")
    if labels.shape != (size,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}: {wanted}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels has dtype {labels.dtype}: {wanted}")


def check_options(*, center: object = 0.0, mix: object = 0.0, warmup_steps: object = 0) -> None:
    """Raise for options of `IRWOptimizer` and `irw_weights` outside their ranges."""
    for name, value, low, high, meaning in (
        ("center", center, 0.0, math.inf, "0 is the paper's rule, 1 what we recommend to try"),
        ("mix", mix, 0.0, 1.0, "the share of plain averaging in the weights"),
    ):
        if (number := as_real(value)) is None:
            raise TypeError(f"{name}={value!r}: expected a number ({meaning})")
        if not low <= number <= high or math.isinf(number):
            bounds = f"[{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
            raise ValueError(f"{name}={value!r}: expected a number in {bounds} ({meaning})")
    if (steps := as_whole(warmup_steps)) is None:
        raise TypeError(
            f"warmup_steps={warmup_steps!r}: expected a whole number of steps, "
            "for example warmup_steps=len(loader) for one epoch"
        )
    if steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps!r}: expected 0 or more steps")
