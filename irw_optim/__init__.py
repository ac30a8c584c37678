"""irw_optim: any torch optimizer, for the people that the average forgets."""

from typing import TYPE_CHECKING, Any

from irw_optim.criterion import PerSampleLoss, per_sample_losses
from irw_optim.optimizer import IRWOptimizer
from irw_optim.weighting import StepRecord, irw_weights, worst_off
from irw_optim.weighting.outliers import DBSCANFilter

if TYPE_CHECKING:
    from irw_optim.model_check import Verification, verify
    from irw_optim.monitor import IRWMonitor
    from irw_optim.remedies import compare_remedies

__version__ = "0.2.0"

__all__ = [
    "DBSCANFilter",
    "IRWMonitor",
    "IRWOptimizer",
    "PerSampleLoss",
    "StepRecord",
    "Verification",
    "compare_remedies",
    "irw_weights",
    "per_sample_losses",
    "verify",
    "worst_off",
]

_WHEN_USED = {
    "IRWMonitor": "monitor",
    "Verification": "model_check",
    "compare_remedies": "remedies",
    "verify": "model_check",
}
"""What a plain training does not need."""


def __getattr__(name: str) -> Any:
    if name not in _WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"irw_optim.{_WHEN_USED[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
