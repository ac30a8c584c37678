"""The options of an optimizer, and what is refused before anything changes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from irw_optim.arguments import DPGuaranteeError, one_of, plain, true_or_false, whole_number
from irw_optim.criterion import validate_criterion
from irw_optim.criterion.attached import check_unattached
from irw_optim.gradients.engine import ENGINES
from irw_optim.torch_internals import is_shard, is_sharded, names_of_bases, several_processes
from irw_optim.weighting import NAMED, LocalScheme, rule_named
from irw_optim.weighting.outliers import OutlierFilter, check_filter
from irw_optim.weighting.weights import Alignment, ScoreRule, check_alpha, check_options


@dataclass(frozen=True)
class Options:
    """What an `IRWOptimizer` was asked for; `score_parameters` as a checkpoint describes it."""

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
        weighting, center = self.weighting, self.center
        check_alpha(self.alpha)
        check_options(center, self.mix)
        steps = "a whole number of steps, 0 or more; warmup_steps=len(loader) makes one epoch"
        whole_number("warmup_steps", self.warmup_steps, 0, steps)
        true_or_false("class_balance", self.class_balance)
        check_filter(self.outliers)
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
        one_of("worst_off", self.worst_off, ("global", "local"))
        for field in fields(self):  # NumPy's numbers become Python's
            vars(self)[field.name] = plain(getattr(self, field.name))

    @cached_property
    def local(self) -> LocalScheme:
        """Decides the weights inside a batch."""
        rule = rule_named(self.weighting, self.center)
        return LocalScheme(float(self.alpha), rule, self.outliers, self.class_balance, self.mix)

    def of(self, scheme: LocalScheme) -> "Options":
        """With what a local scheme says."""
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
        """As plain data, for checkpoints and between processes."""
        return {field.name: described(getattr(self, field.name)) for field in fields(self)}


def described(value: Any) -> Any:
    """An option as plain data, which two runs write alike."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    name = getattr(value, "__qualname__", None) or repr(value)
    return type(value).__qualname__ if " at 0x" in name else name


def check_arguments(
    optimizer: Any, model: Any, criterion: Any, engine: object, compile: object, options: Options
) -> None:
    """Check the arguments of `IRWOptimizer` with each other."""
    check_inner(optimizer)
    if engine not in ENGINES and not callable(engine):
        raise ValueError(
            f"engine={engine!r}: expected one of {', '.join(map(repr, ENGINES))}, or a callable "
            "(losses, parameters) -> PerSampleGradients"
        )
    if engine == "grad_sample" and model is not None:
        raise ValueError(
            "engine='grad_sample' reads what Opacus left in p.grad_sample: expected neither model "
            "nor criterion with it, or engine='auto'"
        )
    if options.score_parameters is not None and model is None:
        raise ValueError(
            f"score_parameters={options.score_parameters!r} is given without model: expected "
            "IRWOptimizer(..., model=model)"
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
    graphs = "; CUDA graphs (mode='reduce-overhead') would overwrite p.grad at every step"
    sharded = model is not None and is_sharded(model)
    if true_or_false("compile", compile, graphs) and (sharded or engine not in ("auto", "ghost")):
        raise ValueError(
            "compile=True compiles the products of layers, which "
            f"{'fully_shard' if sharded else f'engine={engine!r}'} goes without: expected "
            "compile=False, or engine='auto' and a model that is whole"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if sharded or any(map(is_shard, parameters)):
        from irw_optim.distributed.shards import check_sharding

        how = options.weighting, options.accumulation_steps
        check_sharding(model, criterion, parameters, engine, *how)
    check_parameters(parameters, model, criterion)


def check_inner(optimizer: Any) -> None:
    """Refuse what is no optimizer, or must not be inside."""
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in _OPTIMIZER):
        raise no_optimizer(optimizer)
    for inner in optimizers_inside(optimizer):
        kinds = names_of_bases(inner)
        refuse_private(inner)
        if "IRWOptimizer" in kinds:
            raise TypeError(
                "optimizer is an IRWOptimizer already: wrap the optimizer inside it, "
                "IRWOptimizer(optimizer.inner, ...), after optimizer.detach()"
            )
        if prepared := kinds & _PREPARED:
            raise TypeError(
                f"optimizer is an {prepared.pop()}, prepared for its training loop, which would "
                "not save what IRWOptimizer adds: wrap the plain optimizer first, "
                "IRWOptimizer(torch.optim.SGD(...), ...), and prepare that"
            )
        if type(inner).__module__.partition(".")[0] == "deepspeed":
            raise NotImplementedError(
                f"optimizer is DeepSpeed's {type(inner).__name__}, which takes the gradients out "
                "of p.grad: train with DistributedDataParallel, or on one device"
            )


def refuse_private(optimizer: object) -> None:
    """What Opacus made private."""
    if "DPOptimizer" in names_of_bases(optimizer):
        raise DPGuaranteeError(
            f"optimizer is an Opacus {type(optimizer).__name__}: IRW weights would void its "
            "guarantee; use irw_optim.privacy.IRWPrivacyEngine().make_private(..., "
            "irw=IRWDPConfig()) instead"
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
_SHARDED = {"FullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule"}


def optimizers_inside(optimizer: Any) -> list[Any]:
    """The optimizer, and those it wraps."""
    found = [optimizer]
    for outer in found:
        inside = [v for v in vars(outer).values() if isinstance(v, Optimizer)]
        found += [v for v in inside if not any(v is known for known in found)]
    return found


def check_model(model: Any) -> None:
    """Refuse what is no model, or not whole on this device."""
    if model is None:
        return
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r}: expected the torch.nn.Module that is trained; several are one in "
            "torch.nn.ModuleList([first, second])"
        )
    for module in model.modules():
        kinds = names_of_bases(module)
        if sharded := _SHARDED & kinds:
            raise NotImplementedError(
                f"model contains a {sharded.pop()}, whose parameters are spread over devices: use "
                "DistributedDataParallel, torch.distributed.fsdp.fully_shard, or one device"
            )
        if "GradSampleModuleExpandedWeights" in kinds:
            raise TypeError(
                "model is Opacus' GradSampleModuleExpandedWeights, whose parameters answer to no "
                "hook: give the plain model, or leave model and criterion out and call "
                "optimizer.step(losses=losses)"
            )
    if several_processes():
        from irw_optim.distributed.replicas import check_replica, replicas_in

        for replica in replicas_in(model):
            check_replica(replica)


def check_parameters(
    parameters: Sequence[Tensor], model: nn.Module | None, criterion: nn.Module | None
) -> None:
    """Refuse those that are neither the model's nor the criterion's."""
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
            f"the parameters are on several devices ({', '.join(devices)}): put the model on one, "
            "model.to(device), before the optimizer is made, or freeze what stays elsewhere and "
            "leave it out of the optimizer"
        )


def check_group(
    param_group: dict[str, Any],
    others: list[Tensor],
    model: nn.Module | None,
    criterion: nn.Module | None,
) -> dict[str, Any]:
    """Refuse one that does not belong to the others; it, with its parameters in a list."""
    given = param_group["params"]
    parameters = [given] if isinstance(given, Tensor) else list(given)
    tensors = [p[1] if isinstance(p, tuple) else p for p in parameters]
    check_parameters(tensors, model, criterion)
    check_devices([*others, *tensors])
    return {**param_group, "params": parameters}
