"""The options of an optimizer: kept here alone, for who acts on them and who writes them down."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from irw_optim.arguments import plain, true_or_false, whole_number
from irw_optim.weighting import NAMED, LocalScheme, rule_named
from irw_optim.weighting.outliers import OutlierFilter
from irw_optim.weighting.weights import Alignment, ScoreRule, check_alpha, check_options

WORST_OFF = ("global", "local")


@dataclass(frozen=True)
class Options:
    """What an `IRWOptimizer` was asked for; its arguments of the same names say more.

    `score_parameters` is kept as a checkpoint describes it: what it chose is chosen.
    """

    alpha: float
    outliers: OutlierFilter | None = None
    center: float = 0.0
    class_balance: bool = False
    mix: float = 0.0
    warmup_steps: int = 0
    score_parameters: Any = None
    weighting: str | ScoreRule = "irw"
    accumulation_steps: int = 1
    worst_off: str = "global"

    def __post_init__(self) -> None:
        outliers, weighting, center = self.outliers, self.weighting, self.center
        check_alpha(self.alpha)
        check_options(center=center, mix=self.mix, warmup_steps=self.warmup_steps)
        true_or_false("class_balance", self.class_balance)
        if isinstance(outliers, type):
            name = outliers.__name__
            raise TypeError(f"outliers={name} is a class: expected an instance, outliers={name}()")
        if outliers is not None and not callable(outliers):
            raise TypeError(
                f"outliers={outliers!r}: expected None or a filter such as DBSCANFilter(), a "
                "callable from the (B, B) Gram matrix to a bool mask (B,)"
            )
        if isinstance(weighting, str) and weighting not in NAMED:
            raise ValueError(
                f"weighting={weighting!r}: expected one of {', '.join(map(repr, NAMED))}, or a "
                "callable (losses, gradients, worst_off) -> scores; IRWO is 'irw' with "
                "outliers=DBSCANFilter()"
            )
        if not isinstance(weighting, str) and not callable(weighting):
            raise TypeError(f"weighting={weighting!r}: expected a name or a callable")
        if center and weighting != "irw":
            raise ValueError(f"center={center!r} belongs to weighting='irw', not to {weighting!r}")
        together = "1 (weights inside each backward pass) or the number of passes weighed together"
        whole_number("accumulation_steps", self.accumulation_steps, 1, together)
        if self.worst_off not in WORST_OFF:
            raise ValueError(
                f"worst_off={self.worst_off!r}: expected 'global' (of the batch of all processes) "
                "or 'local' (each process weighs its own batch)"
            )
        for field in fields(self):  # NumPy's numbers become Python's
            vars(self)[field.name] = plain(getattr(self, field.name))

    @cached_property
    def local(self) -> LocalScheme:
        """Decides the weights inside a batch."""
        rule = rule_named(self.weighting, self.center)
        return LocalScheme(float(self.alpha), rule, self.outliers, self.class_balance, self.mix)

    def of(self, scheme: LocalScheme) -> Options:
        """The same with what a local scheme says."""
        rule = scheme.rule
        options = replace(
            self,
            alpha=scheme.alpha,
            outliers=scheme.outliers,
            center=rule.center if isinstance(rule, Alignment) else 0.0,
            class_balance=scheme.class_balance,
            mix=scheme.mix,
            weighting=next((n for n, kind in NAMED.items() if type(rule) is kind), rule),
        )
        vars(options)["local"] = scheme
        return options

    def described(self) -> dict[str, Any]:
        """As plain data, for checkpoints and for comparison between processes."""
        return {field.name: described(getattr(self, field.name)) for field in fields(self)}


def described(value: Any) -> Any:
    """An option as plain data, which two runs write alike.

    >>> described(0.3), described(len), described(object())
    (0.3, 'len', 'object')
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None) or repr(value)
    return type(value).__qualname__ if " at 0x" in name else name
