"""An optimizer around another one, whose are groups, state and defaults.

Only hooks are kept twice: each fires on the optimizer it was registered on.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from inspect import ismethod, signature
from operator import attrgetter
from typing import Any
from weakref import finalize, ref

from torch.optim import Optimizer

from irw_optim.arguments import check_state, whole_number
from irw_optim.attachments import Renewed
from irw_optim.weighting import LocalScheme, Scheme, StepRecord

from .options import described, optimizers_inside
from .weighted_backward import WeightedBackward

logger = logging.getLogger("irw_optim")


def option(name: str) -> Any:
    """An attribute that is one of the options, and may be set."""

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


def inners(name: str, *otherwise: Any) -> Any:
    """An attribute that is read, set and deleted on the optimizer inside."""
    return property(
        lambda self: getattr(self.inner, name, *otherwise),
        lambda self, value: setattr(self.inner, name, value),
        lambda self: delattr(self.inner, name),
    )


class OptimizerWrapper(Renewed, Optimizer):
    """Behaves as the optimizer inside, whatever that has, and shows how gradients are weighted.

    Options that may change in mid-training act from the next backward pass on.
    """

    _weighted: WeightedBackward
    _hold: Hold

    alpha = option("alpha")
    outliers = option("outliers")
    center = option("center")
    class_balance = option("class_balance")
    mix = option("mix")
    warmup_steps = option("warmup_steps")
    weighting = option("weighting")

    inner = chosen_once("_weighted.inner")
    score_parameters = chosen_once("_weighted.options.score_parameters")
    accumulation_steps = chosen_once("_weighted.options.accumulation_steps")
    worst_off = chosen_once("_weighted.options.worst_off")
    model = chosen_once("_weighted.engine.model")
    criterion = chosen_once("_weighted.criterion")
    engine = chosen_once("_weighted.engine")
    compile = chosen_once("_weighted.engine.compile")
    processes = chosen_once("_weighted.processes")

    @property
    def replicas(self) -> Any:
        """The former name of `processes`."""
        told = "optimizer.replicas is called optimizer.processes now, and is None in one process"
        warnings.warn(told, DeprecationWarning, stacklevel=2)
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
        """Steps on a weighted gradient that no scaler skipped."""
        return self._weighted.steps

    @property
    def last_step(self) -> StepRecord | None:
        """What the newest backward pass, or logical batch, decided; None before the first."""
        return self._weighted.last

    param_groups = inners("param_groups")
    state = inners("state")
    # A GradScaler leaves these for fused optimizers, which unscale and skip by themselves.
    grad_scale = inners("grad_scale")
    found_inf = inners("found_inf")
    defaults = inners("defaults", {})  # schedule-free's wrapper has none

    @property
    def _step_supports_amp_scaling(self) -> bool:
        takes_the_scaler = "grad_scaler" in signature(self.inner.step).parameters  # the old way
        return not takes_the_scaler and getattr(self.inner, "_step_supports_amp_scaling", False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":  # the latter while a copy is being made
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.inner, name)
        return own_step(self, self._weighted, name, found) if ismethod(found) else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings of the inner optimizer are its own."""
        own = name.startswith("_") or hasattr(type(self), name) or not hasattr(self.inner, name)
        (super().__setattr__ if own else self.inner.__setattr__)(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.inner!r}"

    def own_state(self) -> dict[str, Any]:
        """The steps taken and the options: numbers, strings and None."""
        return {"steps": self.steps, **self._weighted.options.described()}

    def load_own_state(self, own: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's steps; options that differ are logged, and stay."""
        if own is None:
            told = "the checkpoint is a plain optimizer's: its state is loaded, and steps, which "
            logger.warning(told + "warmup_steps counts, stays at %d", self.steps)
            return
        self._weighted.steps = _steps_of(own)
        for name, value in self._weighted.options.described().items():
            if own.get(name, value) != value:
                told = "the checkpoint was made with %s=%r; training goes on with %r"
                logger.warning(told, name, own[name], value)

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
        """Load a state of this, or of a plain optimizer of the inner kind."""
        check_state("state_dict", state_dict)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        if (own := state_dict.pop("irw", None)) is not None:
            _steps_of(own)
        self.inner.load_state_dict(state_dict)
        self.load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks and a scheduler's patch of ``step``, as torch's."""
        own = vars(self).items()
        return {k: v for k, v in own if k != "step" and not k.startswith("_optimizer_")}

    def begin(self) -> None:
        """Take torch's hook tables, and nothing else of its constructor."""
        Optimizer.__setstate__(self, {})
        # Model and criterion are let go in the end: losses, which know them, may live longer.
        finalize(self._hold, _release, ref(self._weighted)).atexit = False


def _steps_of(own: Any) -> int:
    check_state('state_dict["irw"]', own, "steps")
    return whole_number("steps", own["steps"], 0)


class Hold:
    """Lives as long as an optimizer and its shallow copies, which share it."""


def _release(weighted: ref[WeightedBackward]) -> None:
    if (alive := weighted()) is not None:
        alive.release()


IN_ORDER = ("first_step", "second_step", "third_step")
"""In every SAM: the first moves the parameters by the gradient at hand, the second moves them back
and lets an optimizer inside step on that of another pass. Both are checked; the last counts."""


def own_step(
    optimizer: Any, weighted: WeightedBackward, name: str, method: Callable[..., Any]
) -> Callable[..., Any]:
    """A method of the inner optimizer, with what a step of ours has if it takes one."""

    @wraps(method)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        inner = weighted.inner
        own = [step for step in IN_ORDER if hasattr(inner, step)]
        counts = own[-1:] == [name]
        # Where it is the second, parameters come back before an optimizer inside steps.
        if name in own and not (counts and name == IN_ORDER[1]) and weighted.has_gradient():
            weighted.make_ready()

        def before() -> None:
            nonlocal counts
            counts = True
            for pre_hook in tuple(optimizer._optimizer_step_pre_hooks.values()):
                pre_hook(optimizer, args, kwargs)
            weighted.make_ready()

        with before_a_step_of(optimizers_inside(inner), before):
            result = method(*args, **kwargs)
        if counts:
            weighted.step_taken()
            for post_hook in tuple(optimizer._optimizer_step_post_hooks.values()):
                post_hook(optimizer, args, kwargs)
            optimizer._opt_called = True  # where torch's schedulers look whether a step was taken
        return result

    return stepping


def closure_step(weighted: WeightedBackward, closure: Callable[[], Any]) -> Any:
    """The inner optimizer's step with a closure, whose gradient is made ready."""
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}: expected a function that returns the loss, "
            "step() after loss.backward(), or step(losses=losses) with Opacus' per-sample gradients"
        )
    inner, inside = weighted.inner, list[Any]()
    if hasattr(inner, IN_ORDER[0]):
        if weighted.pending:  # by which the parameters move before the closure is called
            weighted.make_ready()
        inside = [o for o in optimizers_inside(inner) if o is not inner]

    def evaluated() -> Any:
        loss = closure()
        # A step may skip its batch, or backward (Lightning does for averaged weights).
        skipped = loss is None or (weighted.steps and not weighted.has_gradient())
        if weighted.pending or not skipped:
            weighted.make_ready()
        return loss

    if not inside:
        return inner.step(evaluated)

    def before() -> None:
        if weighted.has_gradient():
            weighted.make_ready()

    with before_a_step_of(inside, before):  # when they have moved back
        return inner.step(closure)


@contextmanager
def before_a_step_of(optimizers: list[Any], call: Callable[[], None]) -> Iterator[None]:
    """Be called once, just before the first of these steps."""
    calls = [call]

    def pre_hook(*_: Any) -> None:
        if calls:
            calls.pop()()

    with ExitStack() as undo:
        for o in optimizers:
            if isinstance(o, Optimizer):
                undo.callback(o.register_step_pre_hook(pre_hook).remove)
        yield
