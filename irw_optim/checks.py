"""Refuses what cannot work, before anything changes: each message says what is allowed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from irw_optim.criterion import validate_criterion
from irw_optim.gradients.engine import ENGINES
from irw_optim.privacy.errors import DPGuaranteeError
from irw_optim.weighting import check_alpha, check_options

WEIGHTINGS = ("irw", "cvar", "uniform")


def check_arguments(
    optimizer: Any,
    *,
    alpha: object,
    model: Any,
    criterion: Any,
    outliers: Any,
    center: object,
    class_balance: object,
    mix: object,
    warmup_steps: object,
    engine: object,
    weighting: Any,
) -> None:
    """Check the arguments of `IRWOptimizer`, each by itself and with the others.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is allowed.
        DPGuaranteeError: a differentially private optimizer inside.
    """
    check_inner(optimizer)
    check_alpha(alpha)
    check_options(center=center, mix=mix, warmup_steps=warmup_steps)
    if not isinstance(class_balance, bool):
        raise TypeError(f"class_balance={class_balance!r}: expected True or False")
    if outliers is not None and not callable(outliers):
        raise TypeError(
            f"outliers={outliers!r}: expected None or a filter such as DBSCANFilter(), a callable "
            "from the (B, B) Gram matrix to a bool mask (B,)"
        )
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: expected one of {', '.join(map(repr, ENGINES))}")
    if isinstance(weighting, str) and weighting not in WEIGHTINGS:
        raise ValueError(
            f"weighting={weighting!r}: expected one of {', '.join(map(repr, WEIGHTINGS))}, or a "
            "callable (losses, gradients, worst_off) -> scores"
        )
    if not isinstance(weighting, str) and not callable(weighting):
        raise TypeError(f"weighting={weighting!r}: expected a name or a callable")
    if center and weighting != "irw":
        raise ValueError(f"center={center!r} belongs to weighting='irw', not to {weighting!r}")
    check_model(optimizer, model)
    if criterion is not None:
        if model is None:
            raise ValueError(
                "criterion is given without model: expected both, "
                "IRWOptimizer(..., model=model, criterion=criterion)"
            )
        validate_criterion(criterion)


def check_inner(optimizer: Any) -> None:
    """Refuse what is no optimizer, and those whose guarantee the weights would void."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: expected a torch optimizer such as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if "DPOptimizer" in kinds:
        raise DPGuaranteeError(
            f"optimizer is an Opacus {type(optimizer).__name__}: IRW weights depend on every "
            "sample and would void its guarantee; use irw_optim.privacy.IRWPrivacyEngine()"
            ".make_private(..., irw=IRWDPConfig()) instead"
        )
    if "IRWOptimizer" in kinds:
        raise TypeError("optimizer is an IRWOptimizer already: wrap the optimizer inside it")


def check_model(optimizer: Optimizer, model: Any) -> None:
    """Refuse a model whose parameters are not those of the optimizer."""
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected the torch.nn.Module that is trained")
    own = set(model.parameters())
    foreign = [
        p for group in optimizer.param_groups for p in group["params"] if p not in own
    ]
    if foreign:
        raise ValueError(
            f"the optimizer holds {len(foreign)} parameters that are not the model's (the first "
            f"has shape {tuple(foreign[0].shape)}): expected an optimizer over parameters of "
            "model=, for example torch.optim.SGD(model.parameters(), lr=0.1)"
        )


def check_trains(losses: Tensor) -> None:
    """Refuse losses that lead nowhere."""
    if not losses.requires_grad:
        raise RuntimeError(
            "losses do not require a gradient: expected losses computed from the model under "
            "torch.enable_grad(), without .detach() or .item()"
        )
