"""irw_optim: any torch optimizer, for the people that the average forgets."""

from typing import TYPE_CHECKING, Any

from irw_optim.criterion import PerSampleLoss, per_sample_losses
from irw_optim.model_check import Verification, verify
from irw_optim.monitor import IRWMonitor
from irw_optim.optimizer import IRWOptimizer
from irw_optim.weighting import irw_weights, worst_off
from irw_optim.weighting.outliers import DBSCANFilter
from irw_optim.weighting.record import StepRecord

if TYPE_CHECKING:
    from irw_optim.remedies import compare_remedies

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    if name == "compare_remedies":  # with what it needs, only when it is asked for
        from irw_optim.remedies import compare_remedies

        return compare_remedies
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
