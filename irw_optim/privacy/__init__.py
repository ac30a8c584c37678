"""DP-IRW: intrinsic reweighting under differential privacy.

Here a sample is weighed by itself and by what earlier noisy steps have released: the formulas, and
why they are private, are in `irw_optim.privacy.mechanism`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from irw_optim.errors import DPGuaranteeError

from .mechanism import IRWDPConfig

if TYPE_CHECKING:
    from .engine import IRWPrivacyEngine
    from .optimizer import IRWDPOptimizer

__all__ = ["DPGuaranteeError", "IRWDPConfig", "IRWDPOptimizer", "IRWPrivacyEngine"]

# Opacus' engine takes two seconds to import; the rest of the library only wants the error.
_LAZY = {"IRWDPOptimizer": "optimizer", "IRWPrivacyEngine": "engine"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
