"""Refuses what cannot work, before anything changes: each message says what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from irw_optim.criterion import validate_criterion
from irw_optim.criterion.attached import check_unattached
from irw_optim.errors import DPGuaranteeError
from irw_optim.gradients.engine import ENGINES, Engine
from irw_optim.optimizer.options import Options
from irw_optim.processes import is_shard, is_sharded, several_processes


def check_arguments(
    optimizer: Any, *, model: Any, criterion: Any, engine: object, options: Options
) -> None:
    """Check the arguments of `IRWOptimizer` with each other; `Options` has checked its own."""
    check_inner(optimizer)
    if engine not in ENGINES and not callable(engine):
        raise ValueError(
            f"engine={engine!r}: expected one of {', '.join(map(repr, ENGINES))}, or a callable "
            "(losses, parameters) -> PerSampleGradients"
        )
    if engine == "grad_sample" and model is not None:
        raise ValueError(
            "engine='grad_sample' reads what Opacus left in p.grad_sample, in "
            "optimizer.step(losses=losses): expected neither model nor criterion with it, or "
            "engine='auto'"
        )
    if options.score_parameters is not None and model is None:
        raise ValueError(
            f"score_parameters={options.score_parameters!r} is given without model: expected "
            "IRWOptimizer(..., model=model), whose parameters these are"
        )
    if criterion is not None:
        if model is None:
            raise ValueError(
                "criterion is given without model: expected both, "
                "IRWOptimizer(..., model=model, criterion=criterion)"
            )
        validate_criterion(criterion)
        check_unattached(criterion, model)
    check_model(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if (model is not None and is_sharded(model)) or any(map(is_shard, parameters)):
        from irw_optim.distributed.shards import check_sharding

        check_sharding(model, criterion, parameters, engine, options)
    check_parameters(parameters, model, criterion)


def check_inner(optimizer: Any) -> None:
    """Refuse what is no optimizer, and those whose guarantee the weights would void."""
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in _OPTIMIZER):
        raise no_optimizer(optimizer)
    for inner in optimizers_inside(optimizer):
        kinds = {kind.__name__ for kind in type(inner).__mro__}
        if "DPOptimizer" in kinds:
            raise DPGuaranteeError(
                f"optimizer is an Opacus {type(inner).__name__}: IRW weights depend on every "
                "sample and would void its guarantee; use irw_optim.privacy.IRWPrivacyEngine()"
                ".make_private(..., irw=IRWDPConfig()) instead"
            )
        if "IRWOptimizer" in kinds:
            raise TypeError(
                "optimizer is an IRWOptimizer already: wrap the optimizer inside it, "
                "IRWOptimizer(optimizer.inner, ...), after optimizer.detach()"
            )
        if prepared := kinds & _PREPARED:
            raise TypeError(
                f"optimizer is an {prepared.pop()}, prepared for its training loop already, which "
                "would not save what IRWOptimizer adds to a checkpoint: wrap the plain optimizer "
                "first, IRWOptimizer(torch.optim.SGD(...), ...), and prepare that"
            )
        if type(inner).__module__.partition(".")[0] == "deepspeed":
            raise NotImplementedError(
                f"optimizer is DeepSpeed's {type(inner).__name__}, which takes the gradients out "
                "of p.grad before IRW can weigh them: train with DistributedDataParallel, or on "
                "one device"
            )


def no_optimizer(given: object) -> TypeError:
    """What says so."""
    return TypeError(
        f"optimizer={given!r}: expected a torch optimizer such as "
        "torch.optim.SGD(model.parameters(), lr=0.1)"
    )


_OPTIMIZER = ("param_groups", "state", "step", "zero_grad", "add_param_group", "state_dict")
"""What schedule-free's wrapper has too, which is no `Optimizer` by class."""

_PREPARED = {"AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"}


def optimizers_inside(optimizer: Any) -> list[Any]:
    """The optimizer, and those it wraps under whatever attribute names."""
    found = [optimizer]
    for outer in found:
        inside = [v for v in vars(outer).values() if isinstance(v, Optimizer)]
        found += [v for v in inside if not any(v is known for known in found)]
    return found


def check_model(model: Any) -> None:
    """Refuse what is no model, and models whose parameters are not whole on this device."""
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r}: expected the torch.nn.Module that is trained, an instance such as "
            "torch.nn.Linear(4, 2); several models are one in torch.nn.ModuleList([first, second])"
        )
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _SHARDED:
                raise NotImplementedError(
                    f"model contains a {kind.__name__}, whose parameters are spread over devices: "
                    "train with DistributedDataParallel or torch.distributed.fsdp.fully_shard, or "
                    "on one device"
                )
            if kind.__name__ == "GradSampleModuleExpandedWeights":
                raise TypeError(
                    "model is Opacus' GradSampleModuleExpandedWeights, whose parameters answer to "
                    "no hook: give IRWOptimizer the plain model, or leave model and criterion out "
                    "and call optimizer.step(losses=losses)"
                )
    if several_processes():
        from irw_optim.distributed.replicas import check_replica, replicas_in

        for replica in replicas_in(model):
            check_replica(replica)


_SHARDED = {"FullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule"}


def check_parameters(
    parameters: Sequence[Tensor], model: nn.Module | None, criterion: nn.Module | None
) -> None:
    """Refuse parameters that are neither the model's nor the criterion's."""
    trained = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    check_devices([*parameters, *trained])
    if model is None:
        return
    own: set[Tensor] = set(model.parameters())
    if is_sharded(model):
        from irw_optim.distributed.shards import groups_of

        own.update(*groups_of(model))  # a forward hides some
    own.update(criterion.parameters() if criterion is not None else ())
    check_owned(parameters, own, "model")


def check_owned(parameters: Sequence[Tensor], own: set[Tensor], name: str) -> None:
    """Refuse parameters that are not those of the argument ``name``."""
    foreign = [p for p in parameters if p not in own]
    if foreign:
        raise ValueError(
            f"the optimizer holds {len(foreign)} parameters that are not the {name}'s (the first "
            f"has shape {tuple(foreign[0].shape)}): expected an optimizer over parameters of "
            f"{name}=, for example torch.optim.SGD({name}.parameters(), lr=0.1); several models "
            f"are one in {name}=torch.nn.ModuleList([first, second])"
        )


def check_devices(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters on several devices."""
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise NotImplementedError(
            f"the parameters are on several devices ({', '.join(devices)}): the score of a sample "
            "is a product with all of them; put the model on one, model.to(device), before the "
            "optimizer is made, or freeze what stays elsewhere and leave it out of the optimizer"
        )


def check_group(
    param_group: dict[str, Any],
    others: list[Tensor],
    model: nn.Module | None,
    criterion: nn.Module | None,
) -> dict[str, Any]:
    """Refuse a group that does not belong to the others; it, with its parameters in a list."""
    given = param_group["params"]
    parameters = [given] if isinstance(given, Tensor) else list(given)
    tensors = [p[1] if isinstance(p, tuple) else p for p in parameters]
    check_parameters(tensors, model, criterion)
    check_devices([*others, *tensors])
    return {**param_group, "params": parameters}


def check_backward(engine: Engine, losses: Tensor) -> None:
    """Refuse losses that lead nowhere, and any to an optimizer that was made for way 3."""
    if not losses.requires_grad:
        raise RuntimeError(
            "losses do not require a gradient: expected losses computed from the model under "
            "torch.enable_grad(), without .detach() or .item()"
        )
    if engine.kind == "grad_sample":
        raise ValueError(
            "engine='grad_sample' reads what Opacus left in p.grad_sample: expected "
            "losses.mean().backward() and optimizer.step(losses=losses); or leave engine out for "
            "optimizer.backward(losses)"
        )


def check_reads_rows(engine: Engine) -> None:
    """Refuse way 3 to an optimizer that was told to make the rows itself."""
    if engine.kind in ("ghost", "autodiff"):
        raise ValueError(
            f"engine={engine.kind!r} is for gradients made here, and step(losses=losses) reads "
            "those that Opacus left in p.grad_sample: expected optimizer.backward(losses) and "
            "step(), or engine='grad_sample'"
        )


def check_unrecorded(parameters: Sequence[Tensor], model: nn.Module | None, passed: bool) -> bool:
    """Whether gradients without a record are more than zeros; raise if they were not weighted.

    They may be taken aside, cleared and written back changed, as gradient surgery does: where a
    weighted backward pass has ``passed``, whatever is in ``p.grad`` counts as made of it. Zeros
    pass: torch's functions for distributed checkpoints step on them to make an optimizer's state.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise RuntimeError(f"step() found no gradient: {_expected(model)}")
    if not any(map(has_gradient, parameters)):
        return False
    if not passed:
        raise RuntimeError(
            f"step() found a gradient without weights: {_expected(model)}. For a plain step "
            "on purpose call optimizer.inner.step()"
        )
    broken = [g for g in gradients if not bool(_numbers_of(g).isfinite().all())]
    if broken:
        raise FloatingPointError(
            f"the gradients written back to {len(broken)} parameters are not finite (the first "
            f"has shape {tuple(broken[0].shape)}): nothing was updated"
        )
    return True


def _expected(model: nn.Module | None) -> str:
    """What makes a weighted gradient, as far as can be seen what was left out."""
    losses = "optimizer.backward(losses), or step(losses=losses) after Opacus"
    if model is None:
        return (
            "no criterion is attached, so expected IRWOptimizer(..., model=model, "
            f"criterion=criterion) and criterion(model(x), y).backward(); {losses}"
        )
    if not model.training:
        return (
            "the model is in eval mode, where nothing is weighed, so expected train mode, "
            f"model.train(), before criterion(model(x), y).backward(); {losses}"
        )
    return (
        "expected criterion(model(x), y).backward() on the very criterion of IRWOptimizer(..., "
        "model=model, criterion=criterion), called after that line and not given to a newer "
        f"IRWOptimizer since; {losses}"
    )


def has_gradient(parameter: Tensor) -> bool:
    """Whether there is a gradient that is not zero."""
    gradient = parameter.grad
    return gradient is not None and bool(_numbers_of(gradient).any())


def _numbers_of(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient
