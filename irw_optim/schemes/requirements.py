"""What the global scheme needs of an optimizer and its options, and what it does not take."""

from __future__ import annotations

from torch import nn

from irw_optim.arguments import whole_number
from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.engine import ENGINES
from irw_optim.optimizer import IRWOptimizer
from irw_optim.weighting.local_scheme import LocalScheme

USES = ("reweighting", "resampling")
UNITS = ("epochs", "steps")


def local_scheme_of(optimizer: object) -> LocalScheme:
    """The local scheme of an optimizer that a global one may take the place of.

    Raises:
        DPGuaranteeError: a differentially private optimizer.
        TypeError: no IRWOptimizer.
        ValueError: one with a global scheme, or with logical batches.
    """
    if "DPOptimizer" in {kind.__name__ for kind in type(optimizer).__mro__}:
        raise DPGuaranteeError(
            f"optimizer is an Opacus {type(optimizer).__name__}: weights of a whole data set "
            "depend on every sample and would void its guarantee; use "
            "irw_optim.privacy.IRWPrivacyEngine().make_private(..., irw=IRWDPConfig()) instead"
        )
    if not isinstance(optimizer, IRWOptimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: expected an IRWOptimizer(..., model=model, criterion=...)"
        )
    if not isinstance(optimizer.scheme, LocalScheme):
        raise ValueError(
            "optimizer has a GlobalScheme already: call detach() on that one, or keep it"
        )
    if optimizer.accumulation_steps != 1:
        raise ValueError(
            f"optimizer has accumulation_steps={optimizer.accumulation_steps}: held weights are "
            "renormalised in each backward pass; use accumulation_steps=1, which adds the passes up"
        )
    return optimizer.scheme


def model_and_criterion_of(
    optimizer: IRWOptimizer, criterion: nn.Module | None
) -> tuple[nn.Module, nn.Module]:
    """The optimizer's model, and ``criterion`` or the optimizer's.

    Raises:
        ValueError: there is none.
    """
    model = optimizer.engine.model
    if model is None:
        raise ValueError(
            "optimizer has no model: expected IRWOptimizer(..., model=model), whose gradients "
            "the weights are made of"
        )
    criterion = criterion or optimizer.criterion
    if criterion is None:
        raise ValueError(
            "criterion=None and the optimizer has none: give the one that the losses come from, "
            "for example GlobalScheme(..., criterion=torch.nn.CrossEntropyLoss())"
        )
    return model, criterion


def check_choices(refresh: object, unit: object, use: object) -> int:
    """The number ``refresh``, or an error unless these are arguments of GlobalScheme."""
    for name, value, allowed in (("unit", unit, UNITS), ("use", use, USES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}")
    return whole_number("refresh", refresh, 1, "a whole number >= 1 of epochs or steps")


def check_engine(engine: object) -> None:
    """Refuse what is no engine, and the one that reads gradients of a loop, of which there is none.

    Raises:
        ValueError: that.
    """
    allowed = [kind for kind in ENGINES if kind != "grad_sample"]
    if engine not in allowed:
        why = ""
        if engine == "grad_sample":
            why = ", which reads what a backward pass of the training loop left in p.grad_sample"
        raise ValueError(f"engine={engine!r}{why}: expected one of {', '.join(map(repr, allowed))}")


def check_block(outlier_block: object) -> int:
    """The whole number of samples that ``outlier_block`` is, or an error."""
    expected = (
        "the number of samples that the filter compares with each other, for example "
        "outlier_block=256"
    )
    return whole_number("outlier_block", outlier_block, 1, expected)
