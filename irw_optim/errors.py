"""The one error of the private mode; imports nothing, so that any module may raise it."""

__all__ = ["DPGuaranteeError"]


class DPGuaranteeError(RuntimeError):
    """What was asked for would run, but the privacy guarantee it reports would be false.

    Raised before any state changes. Nothing in this package downgrades it to a warning: a wrong
    epsilon cannot be seen in the results, so the only safe place to stop is before the first step.

    Example:
        >>> raise DPGuaranteeError("BatchNorm mixes the samples of a batch")
        Traceback (most recent call last):
        ...
        irw_optim.errors.DPGuaranteeError: BatchNorm mixes the samples of a batch
    """
