"""DP-IRW: intrinsic reweighting under differential privacy.

Reweighting by the batch and then adding DP-SGD's noise is not private: one person moves everybody
else's weight. Here a sample is weighed by itself and by what earlier noisy steps have released::

    engine = IRWPrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, criterion=criterion,
        noise_multiplier=1.0, max_grad_norm=1.0, irw=IRWDPConfig(init_threshold=math.log(classes)),
    )

    config      the public parameters           mechanism   the formulas, pure
    optimizer   the state of a training         engine      the wiring
    refusals    what would void the guarantee   pending, rows   how a batch gets in
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from irw_optim.errors import DPGuaranteeError

from .config import IRWDPConfig

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
