"""DP-IRW: intrinsic reweighting under differential privacy."""

from .errors import DPGuaranteeError

__all__ = ["DPGuaranteeError"]
