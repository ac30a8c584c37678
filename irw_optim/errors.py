"""The error of the private mode; imports nothing, so that any module may raise it."""


class DPGuaranteeError(RuntimeError):
    """What was asked for would run, but the privacy guarantee it reports would be false.

    Raised before any state changes: a wrong epsilon cannot be seen in the results.
    """
