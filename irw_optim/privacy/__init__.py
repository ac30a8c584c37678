"""DP-IRW: intrinsic reweighting under differential privacy."""

from typing import TYPE_CHECKING, Any

from irw_optim.arguments import DPGuaranteeError

from .mechanism import IRWDPConfig

if TYPE_CHECKING:
    from .engine import IRWPrivacyEngine
    from .optimizer import IRWDPOptimizer

__all__ = ["DPGuaranteeError", "IRWDPConfig", "IRWDPOptimizer", "IRWPrivacyEngine"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import engine  # Opacus takes two seconds to import

    return getattr(engine, name)
