"""Steps that an inner optimizer has beside `step`: two or three of them, as in every SAM.

``first_step`` moves the parameters by the gradient at hand, ``second_step`` moves them back and
lets an optimizer inside step on the gradient of a second pass. Both gradients are checked as before
`step`. The last of them counts, as does whatever other method lets an optimizer inside step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.optim import Optimizer

from irw_optim.optimizer.checks import optimizers_inside
from irw_optim.optimizer.weighted_backward import WeightedBackward

IN_ORDER = ("first_step", "second_step", "third_step")


def own_step(
    optimizer: Any, weighted: WeightedBackward, name: str, method: Callable[..., Any]
) -> Callable[..., Any]:
    """A method of the inner optimizer, with what belongs to a step of ours if it takes one."""

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
    """Take the inner optimizer's step with a closure, whose gradient is made ready."""
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
        if loss is not None or weighted.pending:  # a training step may skip its batch
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
    waiting = True

    def pre_hook(*_: Any) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            call()

    handles = [o.register_step_pre_hook(pre_hook) for o in optimizers if isinstance(o, Optimizer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
