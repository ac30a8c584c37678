"""What of an optimizer can be looked at: its options, what acts on them, and how far it is.

Options that may change in mid-training are set here, and act from the next backward pass on.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from irw_optim.optimizer.options import Options, described
from irw_optim.optimizer.weighted_backward import WeightedBackward
from irw_optim.weighting.local_scheme import LocalScheme, Scheme
from irw_optim.weighting.record import StepRecord


def option(name: str) -> Any:
    """An attribute of an optimizer that is one of its options, and may be set."""

    def change(self: Any, value: Any) -> None:
        self._weighted.options = replace(self._weighted.options, **{name: value})

    return property(lambda self: getattr(self._weighted.options, name), change)


def chosen_once(name: str, part: str) -> Any:
    """An attribute that was decided when the optimizer was made."""

    def refuse(self: Any, value: Any) -> None:
        raise AttributeError(
            f"{name}={described(getattr(self, name))!r} was chosen when the optimizer was made, "
            f"and cannot be set to {described(value)!r}: call optimizer.detach(), and make a new "
            "IRWOptimizer(optimizer.inner, ...) with what you want"
        )

    return property(lambda self: getattr(getattr(self, part), name), refuse)


class Attributes:
    """The attributes of an `IRWOptimizer`; everything is kept in one place behind them."""

    _weighted: WeightedBackward

    alpha = option("alpha")
    outliers = option("outliers")
    center = option("center")
    class_balance = option("class_balance")
    mix = option("mix")
    warmup_steps = option("warmup_steps")
    weighting = option("weighting")

    score_parameters = chosen_once("score_parameters", "_options")
    accumulation_steps = chosen_once("accumulation_steps", "_options")
    worst_off = chosen_once("worst_off", "_options")
    model = chosen_once("model", "engine")
    criterion = chosen_once("criterion", "_hold")
    engine = chosen_once("engine", "_weighted")
    processes = chosen_once("processes", "_weighted")

    @property
    def replicas(self) -> Any:
        """The former name of `processes`."""
        warnings.warn(
            "optimizer.replicas is called optimizer.processes now, and is None in one process",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.processes

    @property
    def _options(self) -> Options:
        return self._weighted.options

    @property
    def scheme(self) -> Scheme:
        """Decides the weights; a `LocalScheme` that is set says new options."""
        return self._weighted.scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        if isinstance(scheme, LocalScheme):
            self._weighted.options = self._options.of(scheme)
            self._weighted.held = None
        else:
            self._weighted.held = scheme

    @property
    def local_scheme(self) -> LocalScheme:
        """Decides the weights inside a batch, as the options say."""
        return self._options.local

    @property
    def steps(self) -> int:
        """Optimizer steps on a weighted gradient; those that a scaler skipped do not count."""
        return self._weighted.progress.steps

    @property
    def last_step(self) -> StepRecord | None:
        """What the newest backward pass decided; None before the first."""
        return self._weighted.progress.last
