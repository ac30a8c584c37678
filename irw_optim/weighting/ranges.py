"""What values the arguments of the algorithm may have: raises with what is allowed."""

from __future__ import annotations

from torch import Tensor

from irw_optim.arguments import real_number, whole_number


def check_alpha(alpha: object) -> float:
    """Return ``alpha`` as a float, or raise an error that says what is allowed.

    >>> check_alpha(0.2)
    0.2
    """
    meaning = "a lower bound on the share of the smallest group, for example alpha=0.2"
    return real_number("alpha", alpha, "(0, 1]", meaning)


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
    recommended = "where 0 is the paper's rule, and 1 what we recommend to try"
    real_number("center", center, "[0, inf)", recommended)
    real_number("mix", mix, "[0, 1]", "the share of plain averaging in the weights")
    steps = "a whole number of steps, 0 or more, for example warmup_steps=len(loader) for one epoch"
    whole_number("warmup_steps", warmup_steps, 0, steps)
