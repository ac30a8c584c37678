"""An optimizer around another one: groups, state and defaults are the inner one's.

With torch's own constructor a scheduler or a checkpoint would change the wrapper's, and the step
read the others. Only hooks are kept twice: each fires on the optimizer it was registered on.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from inspect import ismethod, signature
from operator import attrgetter
from typing import Any
from weakref import finalize, ref

from torch.optim import Optimizer

from irw_optim.attachments import Renewed
from irw_optim.optimizer.options import described
from irw_optim.optimizer.own_steps import own_step
from irw_optim.optimizer.weighted_backward import WeightedBackward
from irw_optim.weighting import LocalScheme, Scheme, StepRecord

logger = logging.getLogger("irw_optim")


def option(name: str) -> Any:
    """An attribute of an optimizer that is one of its options, and may be set."""

    def change(self: OptimizerWrapper, value: Any) -> None:
        self._weighted.options = replace(self._weighted.options, **{name: value})

    return property(attrgetter(f"_weighted.options.{name}"), change)


def chosen_once(path: str) -> Any:
    """An attribute that was decided when the optimizer was made."""
    name = path.rpartition(".")[2]

    def refuse(self: Any, value: Any) -> None:
        raise AttributeError(
            f"{name}={described(getattr(self, name))!r} was chosen when the optimizer was made, "
            f"and cannot be set to {described(value)!r}: call optimizer.detach(), and make a new "
            "IRWOptimizer(optimizer.inner, ...) with what you want"
        )

    return property(attrgetter(path), refuse)


def inners(name: str) -> Any:
    """An attribute that is read, set and deleted on the optimizer inside."""
    return property(
        attrgetter(f"inner.{name}"),
        lambda self, value: setattr(self.inner, name, value),
        lambda self: delattr(self.inner, name),
    )


class OptimizerWrapper(Renewed, Optimizer):
    """Behaves as the optimizer inside, and shows how its gradients are weighted.

    Options that may change in mid-training are set here, and act from the next backward pass on.
    What the inner optimizer has beyond torch's `Optimizer`, such as the ``train()`` and ``eval()``
    of schedule-free ones, is there on the wrapper as well.
    """

    inner: Optimizer
    _weighted: WeightedBackward
    _hold: Hold

    alpha = option("alpha")
    outliers = option("outliers")
    center = option("center")
    class_balance = option("class_balance")
    mix = option("mix")
    warmup_steps = option("warmup_steps")
    weighting = option("weighting")

    score_parameters = chosen_once("_weighted.options.score_parameters")
    accumulation_steps = chosen_once("_weighted.options.accumulation_steps")
    worst_off = chosen_once("_weighted.options.worst_off")
    model = chosen_once("_weighted.engine.model")
    criterion = chosen_once("_weighted.criterion")
    engine = chosen_once("_weighted.engine")
    processes = chosen_once("_weighted.processes")

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
    def scheme(self) -> Scheme:
        """Decides the weights; a `LocalScheme` that is set says new options."""
        return self._weighted.scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        if isinstance(scheme, LocalScheme):
            self._weighted.options = self._weighted.options.of(scheme)
            self._weighted.held = None
        else:
            self._weighted.held = scheme

    @property
    def local_scheme(self) -> LocalScheme:
        """Decides the weights inside a batch, as the options say."""
        return self._weighted.options.local

    @property
    def steps(self) -> int:
        """Optimizer steps on a weighted gradient; those that a scaler skipped do not count."""
        return self._weighted.steps

    @property
    def last_step(self) -> StepRecord | None:
        """What the newest backward pass decided; None before the first."""
        return self._weighted.last

    # A torch optimizer's -----------------------------------------------------------------------

    param_groups = inners("param_groups")
    state = inners("state")
    # A GradScaler leaves these for fused optimizers, which unscale and skip by themselves.
    grad_scale = inners("grad_scale")
    found_inf = inners("found_inf")

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's; empty for one that has none, as schedule-free's wrapper."""
        return getattr(self.inner, "defaults", {})

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the scaler leaves unscaling and skipping to the step."""
        takes_the_scaler = "grad_scaler" in signature(self.inner.step).parameters  # the old way
        return not takes_the_scaler and getattr(self.inner, "_step_supports_amp_scaling", False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":  # the latter while a copy is being made
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.inner, name)
        return own_step(self, self._weighted, name, found) if ismethod(found) else found

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.inner!r}"

    # Checkpoints -----------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """The steps taken, and the options for comparison: numbers, strings and None."""
        return {"steps": self.steps, **self._weighted.options.described()}

    def load_own_state(self, own: dict[str, Any] | None) -> None:
        """Go on from the steps of a checkpoint; options that differ are logged, and stay as now."""
        if own is None:
            logger.warning(
                "the checkpoint is a plain optimizer's: its state is loaded, and steps, which "
                "warmup_steps counts, stays at %d",
                self.steps,
            )
            return
        self._weighted.steps = own["steps"]
        for name, value in self._weighted.options.described().items():
            if own.get(name, value) != value:
                logger.warning(
                    "the checkpoint was made with %s=%r; training goes on with %r",
                    *(name, own[name], value),
                )

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with `own_state` under ``"irw"``."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = {**self.inner.state_dict(), "irw": self.own_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of a plain one of the inner kind."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        own = state_dict.pop("irw", None)
        self.inner.load_state_dict(state_dict)
        self.load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Copies -------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks and without a scheduler's patch of ``step``, as torch's optimizers."""
        own = vars(self).items()
        return {k: v for k, v in own if k != "step" and not k.startswith("_optimizer_")}

    def begin(self) -> None:
        """Take torch's hook tables, and nothing else of its constructor.

        Model and criterion are let go in the end: losses, which know them, may live longer.
        """
        Optimizer.__setstate__(self, {})
        finalize(self._hold, _release, ref(self._weighted)).atexit = False


class Hold:
    """Lives as long as the last of an optimizer and its shallow copies, which share it."""


def _release(weighted: ref[WeightedBackward]) -> None:
    alive = weighted()
    if alive is not None:
        alive.release()
