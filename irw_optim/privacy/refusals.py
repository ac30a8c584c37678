"""What would run but make the reported epsilon false, refused by name."""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from irw_optim.arguments import DPGuaranteeError, one_of, real_number
from irw_optim.criterion import validate_criterion
from irw_optim.gradients.hooks import weighed_by
from irw_optim.optimizer.options import check_owned, no_optimizer, optimizers_inside

from .mechanism import IRWDPConfig, refuse_batch_level_options
from .pending import PendingBatch, follower_of


def refuse_options(unknown: dict[str, Any], *, of: Callable[..., Any]) -> None:
    """Raise for keyword arguments that `of` does not read, which Opacus would swallow."""
    refuse_batch_level_options(unknown)
    for name in unknown:
        parameters = inspect.signature(of).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        raise TypeError(f"{of.__name__} got an unexpected keyword argument {name!r}: {hint}")


def check_fixed(**options: object) -> None:
    """Refuse arguments that have one value here with any other."""
    for name, given in options.items():
        value, why = _FIXED[name]
        if given != value:
            error = NotImplementedError if name == "clipping" else DPGuaranteeError
            raise error(f"{name}={given!r}: {why}; leave {name}={value!r}")


_FIXED: dict[str, tuple[object, str]] = {
    "poisson_sampling": (True, "amplification by sampling holds for independent draws only"),
    "rand_on_empty": (False, "a made-up sample doubles what one person can change"),
    "clipping": ("flat", "no other is built"),
}


def check_mechanism(
    irw: object,
    optimizer: object,
    noise_multiplier: object,
    max_grad_norm: object,
    loss_reduction: object,
) -> tuple[float, float]:
    """Sigma and C as plain numbers, if all is as it should be."""
    from irw_optim.optimizer import IRWOptimizer  # it imports this package for its own refusals

    if not isinstance(irw, IRWDPConfig):
        raise TypeError(
            f"irw={irw!r}: expected an IRWDPConfig, for example "
            "irw=IRWDPConfig(init_threshold=math.log(number_of_classes))"
        )
    if not isinstance(optimizer, Optimizer):
        raise no_optimizer(optimizer)
    for inner in optimizers_inside(optimizer):
        what = f"optimizer is a {type(inner).__name__}, or wraps one"
        if isinstance(inner, IRWOptimizer):
            raise DPGuaranteeError(
                "optimizer is an IRWOptimizer, or wraps one: its weights depend on the whole batch "
                "before the noise. Pass the plain torch optimizer, detach() the IRWOptimizer from "
                "the model, and give make_private(..., irw=IRWDPConfig(...))"
            )
        if isinstance(inner, DPOptimizer):
            raise DPGuaranteeError(
                f"{what}: two noises would be accounted as one. Pass the plain torch optimizer"
            )
        if isinstance(inner, torch.optim.LBFGS):
            raise NotImplementedError(
                f"{what}, which looks at a batch more than once: use a first-order optimizer"
            )
    if isinstance(max_grad_norm, Sequence):
        raise NotImplementedError(
            f"max_grad_norm={max_grad_norm!r}: per-layer clipping is not built; expected one number"
        )
    one_of("loss_reduction", loss_reduction, ("mean", "sum"))
    sigma = real_number("noise_multiplier", noise_multiplier, "[0, inf)")
    return sigma, real_number("max_grad_norm", max_grad_norm, "(0, inf)")


def check_ways(
    mode: str,
    criterion: nn.Module | None,
    loss_reduction: str,
    noise_generator: object,
    batch_first: bool,
    secure_mode: bool,
) -> None:
    """Raise for ways that are not built, or lack something."""
    if mode not in ("hooks", "functorch", "ew", "ghost"):
        raise NotImplementedError(
            f"grad_sample_mode={mode!r}: expected 'hooks', 'functorch', 'ew' or 'ghost'"
        )
    if mode == "ghost" and criterion is None:
        raise ValueError(
            "grad_sample_mode='ghost' without a criterion: expected criterion=, or "
            "criterion=PerSampleLoss(function)"
        )
    if mode == "ghost" and not batch_first:
        raise NotImplementedError(
            "batch_first=False: ghost mode takes the batch in dimension 0; use "
            "grad_sample_mode='hooks'"
        )
    if noise_generator is not None and not isinstance(noise_generator, torch.Generator):
        raise TypeError(f"noise_generator={noise_generator!r}: expected a torch.Generator or None")
    if noise_generator is not None and secure_mode:
        raise ValueError("noise_generator is given, but secure mode has its own: leave it out")
    if criterion is not None:
        validate_criterion(criterion)
        if criterion.reduction != loss_reduction:  # clipping would depend on how many were drawn
            raise ValueError(
                f"criterion {type(criterion).__name__} has reduction={criterion.reduction!r} and "
                f"loss_reduction={loss_reduction!r}: expected the same"
            )


def check_loader(loader: DataLoader[Any]) -> None:
    """Raise unless it can become one that draws each sample independently."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"data_loader={loader!r}: expected a torch.utils.data.DataLoader")
    if hasattr(loader.dataset, "__len__") and not len(loader.dataset):
        raise ValueError("data_loader.dataset is empty: expected at least one sample")
    poisson = isinstance(loader.batch_sampler, UniformWithReplacementSampler)
    if poisson or isinstance(loader, DPDataLoader):
        return
    for sampler in (loader.sampler, loader.batch_sampler):
        if type(sampler) not in (SequentialSampler, RandomSampler, BatchSampler):
            raise DPGuaranteeError(
                f"data_loader draws with {type(sampler).__name__}, which Poisson sampling would "
                "replace: pass a loader without a sampler of its own (over a "
                "torch.utils.data.Subset for a part); global IRW weights are not private"
            )
    if isinstance(loader.sampler, RandomSampler) and loader.sampler.replacement:
        raise DPGuaranteeError(
            "data_loader draws with replacement: a sample could come twice; pass shuffle=True or "
            "nothing"
        )


def check_module(
    module: nn.Module, optimizer: Optimizer, criterion: nn.Module | None = None
) -> None:
    """Raise for models in which one sample's gradient depends on the others."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module={module!r}: expected the torch.nn.Module that is trained")
    for name, child in module.named_modules():
        where = f"{name or 'the model'} is a {type(child).__name__}"
        if isinstance(child, _BatchNorm):
            raise DPGuaranteeError(
                f"{where}: batch statistics let one sample change the gradients of all, also where "
                "it is frozen. Use GroupNorm, as IRWPrivacyEngine.get_compatible_module(model)"
            )
        if isinstance(child, _InstanceNorm) and child.track_running_stats:
            raise DPGuaranteeError(
                f"{where} with track_running_stats=True: they are released without noise; set "
                "track_running_stats=False"
            )
        if isinstance(child, DistributedDataParallel | FullyShardedDataParallel | FSDPModule):
            raise NotImplementedError(
                f"{where}: it averages or shards gradients before the noise; expected "
                "opacus.distributed.DifferentiallyPrivateDistributedDataParallel"
            )
        if weighed_by(child) or any(map(_is_irw_hook, _hooks(child))):
            raise DPGuaranteeError(
                f"an IRWOptimizer, or one in ghost mode, is attached to the model: {_REWEIGHTED}"
            )
    if criterion is not None and not isinstance(follower_of(criterion), PendingBatch | None):
        raise DPGuaranteeError(f"an IRWOptimizer is attached to the criterion: {_REWEIGHTED}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check_owned(parameters, set(module.parameters()), "module")  # only theirs are made private


_REWEIGHTED = "gradients are reweighted before they are clipped. Call its detach() first"


def _hooks(module: nn.Module) -> list[Any]:
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return [vars(module).get("forward"), *(hook for table in tables for hook in table.values())]


def _is_irw_hook(hook: Any) -> bool:
    """Or a forward that was replaced, of what is not private here."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("irw_optim.") and not home.startswith("irw_optim.privacy.")


def check_checkpoint(saved: Any, config: IRWDPConfig, parameters: Sequence[Tensor]) -> None:
    """Raise unless it is of such an optimizer, config and model."""
    if saved is None:
        raise ValueError("state_dict has no 'irw_dp' entry: expected that of an IRWDPOptimizer")
    pairs = [(name, value, saved["config"].get(name)) for name, value in asdict(config).items()]
    differing = [f"{name}={here!r} here, {was!r} saved" for name, here, was in pairs if here != was]
    if differing:
        raise ValueError(
            f"state_dict was saved with another IRWDPConfig ({'; '.join(differing)}): expected the "
            "same"
        )
    shapes = [None if v is None else v.shape for v in saved["direction"]]
    wanted = [p.shape for p in parameters]
    same = len(shapes) == len(wanted)
    if not same or any(s not in (None, w) for s, w in zip(shapes, wanted, strict=True)):
        raise ValueError(
            f"state_dict's direction has shapes {shapes} but the parameters have {wanted}: "
            "expected the same model"
        )
