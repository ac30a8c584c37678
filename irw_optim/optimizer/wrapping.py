"""An optimizer around another one, of which everything stays where it was.

torch's own `Optimizer` constructor would give a wrapper groups, state and hook tables of its own,
which a scheduler or a checkpoint then changes in one place and the step reads in another. Here
there is one of each thing: groups, state and defaults are the inner optimizer's. Only hooks are
kept twice, since whoever registers one expects the optimizer it was registered on.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import ismethod, signature
from typing import Any

from torch.optim import Optimizer

from irw_optim.copies import Renewed


def one_of(part: str, name: str) -> Any:
    """An attribute that is read, set and deleted on a part of the object."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
        lambda self: delattr(getattr(self, part), name),
    )


_HOOKS = (
    *("step_pre_hooks", "step_post_hooks", "state_dict_pre_hooks", "state_dict_post_hooks"),
    *("load_state_dict_pre_hooks", "load_state_dict_post_hooks"),
)


class OptimizerWrapper(Renewed, Optimizer):
    """Behaves as the optimizer inside; a base class for one that adds something.

    What the inner optimizer has beyond torch's `Optimizer`, such as the ``train()`` and ``eval()``
    of schedule-free ones, is there on the wrapper as well.

    Args:
        inner: the optimizer that takes the steps.

    Attributes:
        inner: the same.
    """

    SECTION: str
    """The key of `own_state` in the state dict, beside torch's ``state`` and ``param_groups``."""

    param_groups = one_of("inner", "param_groups")
    state = one_of("inner", "state")
    # A GradScaler leaves these for fused optimizers, which unscale and skip by themselves.
    grad_scale = one_of("inner", "grad_scale")
    found_inf = one_of("inner", "found_inf")

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.begin()

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
        return self.around(name, found) if ismethod(found) else found

    def around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a method that only the inner optimizer has."""
        return method

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.inner!r}"

    # Checkpoints -----------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any]:
        """What the wrapper adds to the state dict: numbers, strings and containers of these."""
        return {}

    def load_own_state(self, own: dict[str, Any] | None) -> None:
        """Take what `own_state` gave; None from the checkpoint of a plain optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state under its usual keys, the wrapper's under one of its own."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = {**self.inner.state_dict(), self.SECTION: self.own_state()}
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
        own = state_dict.pop(self.SECTION, None)
        self.inner.load_state_dict(state_dict)
        self.load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Copies are without hooks and without a scheduler's patch of ``step``, as torch's optimizers.

    PASSING = ("step", *(f"_optimizer_{hooks}" for hooks in _HOOKS))

    def begin(self) -> None:
        """Take torch's hook tables, and nothing else of its constructor."""
        Optimizer.__setstate__(self, {})
