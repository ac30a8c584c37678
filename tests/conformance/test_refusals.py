"""What cannot be had is named, with the way out, before anything is attached."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import nn
from torch.optim import SGD, Optimizer
from torch.torch_version import TorchVersion

from irw_optim import IRWOptimizer
from irw_optim.privacy import DPGuaranteeError


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(4, 5, 2)


def kind(name: str, base: type = Optimizer, module: str = "somewhere") -> Any:
    return type(name, (base,), {"__module__": module})


def around(inner: Optimizer, name: str) -> Any:
    """Another library's wrapper, which keeps the optimizer under a name of its own."""

    class Wrapper(kind(name)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.wrapped = inner
            super().__init__(inner.param_groups, {})

    return Wrapper()


def refused(
    error: type[Exception], match: str, /, inner: Any = None, *, alpha: Any = 0.3, **options: Any
) -> None:
    net, criterion = options.pop("model", None) or model(), nn.CrossEntropyLoss()
    arguments: dict[str, Any] = {"model": net, "criterion": criterion, **options}
    inner = SGD(net.parameters(), lr=0.1) if inner is None else inner
    hooks = {m: dict(m._forward_hooks) for m in net.modules()} if isinstance(net, nn.Module) else {}
    with pytest.raises(error, match=match):
        IRWOptimizer(inner, alpha=alpha, **arguments)
    assert "forward" not in vars(criterion)
    assert all(dict(m._forward_hooks) == before for m, before in hooks.items())


@pytest.mark.parametrize("inner", [SGD, model(), None.__class__, "sgd", {"lr": 0.1}, 3], ids=str)
def test_what_is_no_optimizer(inner: Any) -> None:
    refused(
        TypeError, "(?s)optimizer=.*: expected a torch optimizer such as torch.optim.SGD", inner
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 0.0}, r"alpha=0.0: expected a number in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha=1.5: expected"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "0.2"}, "alpha='0.2'"),
        ({"alpha": True}, "alpha=True"),
        ({"center": -1.0}, "center=-1.0"),
        ({"center": 1.0, "weighting": "cvar"}, "center=1.0 belongs to weighting='irw'"),
        ({"mix": 1.1}, "mix=1.1"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5"),
        ({"class_balance": 1}, "class_balance=1"),
        ({"outliers": 0.5}, "outliers=0.5: expected None or a filter such as DBSCANFilter"),
        ({"engine": "fast"}, "engine='fast': expected one of 'auto'"),
        ({"weighting": "dro"}, "weighting='dro': expected one of 'irw'"),
        ({"weighting": 3}, "weighting=3"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"score_parameters": ["3"]}, "score_parameters names '3', which the model does not have"),
        ({"score_parameters": 3}, "score_parameters=3"),
        ({"score_parameters": "last", "model": None, "criterion": None}, "without model"),
        ({"model": None}, "criterion is given without model"),
        ({"criterion": nn.MSELoss(reduction="none")}, "reduction='none'"),
        ({"criterion": max}, "criterion="),
        ({"model": "net"}, "model='net': expected the torch.nn.Module"),
        ({"model": [model()]}, "expected the torch.nn.Module"),
    ],
    ids=str,
)
def test_arguments_that_are_impossible(options: dict[str, Any], match: str) -> None:
    net = model()
    with pytest.raises((ValueError, TypeError), match=match):
        IRWOptimizer(
            SGD(net.parameters(), lr=0.1),
            **{"alpha": 0.3, "model": net, "criterion": nn.CrossEntropyLoss(), **options},
        )
    assert not any(m._forward_hooks for m in net.modules())


def test_an_unknown_argument_is_python_s_own_error() -> None:
    refused(TypeError, "unexpected keyword argument 'aplha'", aplha=0.3)


def test_parameters_of_another_model() -> None:
    net, other = model(), model()
    refused(
        ValueError,
        r"4 parameters that are not the model's.*\(5, 4\)",
        SGD(net.parameters()),
        model=other,
    )


def test_several_models_are_refused_with_the_way_out_which_works() -> None:
    first, second, criterion = nn.Linear(4, 5), nn.Linear(5, 2), nn.CrossEntropyLoss()
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.01}]
    inner = SGD(groups, lr=0.1)
    refused(ValueError, r"2 parameters.*ModuleList\(\[first, second\]\)", inner, model=first)
    both = nn.ModuleList([first, second])
    optimizer = IRWOptimizer(inner, alpha=0.3, model=both, criterion=criterion)
    criterion(second(first(torch.randn(8, 4)).tanh()), torch.randint(2, (8,))).backward()
    optimizer.step()
    assert optimizer.steps == 1


class Prototypes(nn.Module):
    """A criterion that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(2, 5))
        self.reduction = "mean"

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = (features - self.centers[target]).square().sum(1)
        return losses if self.reduction == "none" else losses.mean()


def test_parameters_of_the_criterion_are_welcome() -> None:
    net, criterion = nn.Linear(4, 5), Prototypes()
    inner = SGD([*net.parameters(), *criterion.parameters()], lr=0.1)
    optimizer = IRWOptimizer(inner, alpha=0.3, model=net, criterion=criterion)
    criterion(net(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
    before = criterion.centers.detach().clone()
    optimizer.step()
    assert not torch.equal(criterion.centers, before)


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: around(inner, "Lookahead")])
def test_an_irw_optimizer_inside(wrap: Callable[[Any], Any]) -> None:
    net = model()
    ours = IRWOptimizer(SGD(net.parameters(), lr=0.1), alpha=0.3)
    refused(TypeError, "IRWOptimizer already: wrap the optimizer inside", wrap(ours), model=net)


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: around(inner, "Lookahead")])
def test_a_private_optimizer_inside(wrap: Callable[[Any], Any]) -> None:
    from opacus.optimizers import DPOptimizer

    net = model()
    private = DPOptimizer(
        SGD(net.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    refused(DPGuaranteeError, "DPOptimizer.*IRWPrivacyEngine", wrap(private), model=net)


def test_stepping_inside_make_private_is_refused() -> None:
    net = model()
    optimizer = IRWOptimizer(SGD(net.parameters(), lr=0.1), alpha=0.3)
    net[0].weight.summed_grad = torch.zeros(5, 4)
    with pytest.raises(DPGuaranteeError, match=r"summed_grad.*IRWPrivacyEngine"):
        optimizer.step()


@pytest.mark.parametrize("name", ["AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer"])
def test_an_optimizer_that_was_prepared_already(name: str) -> None:
    net = model()
    inner = around(SGD(net.parameters(), lr=0.1), name)
    refused(TypeError, f"{name}.*wrap the plain optimizer first", inner, model=net)


def test_deepspeed_s_optimizer() -> None:
    net = model()
    inner = kind("DeepSpeedZeroOptimizer", SGD, "deepspeed.runtime.zero")(net.parameters(), lr=0.1)
    refused(
        NotImplementedError,
        "DeepSpeed's DeepSpeedZeroOptimizer.*DistributedDataParallel",
        inner,
        model=net,
    )


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule"])
@pytest.mark.parametrize("inside", [False, True])
def test_models_spread_over_devices(name: str, inside: bool) -> None:
    net = kind(name, nn.Linear)(4, 2)
    net = nn.Sequential(net) if inside else net
    refused(NotImplementedError, f"{name}.*spread over devices", model=net)


def test_sharded_models_with_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    net = kind("FSDPModule", nn.Linear)(4, 2)
    refused(NotImplementedError, "torch 2.12.1: expected torch 2.13.*DistributedData", model=net)


def test_the_names_are_those_of_the_libraries() -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    assert FSDPModule.__name__ == "FSDPModule"
    assert FullyShardedDataParallel.__name__ == "FullyShardedDataParallel"


def test_parameters_on_several_devices() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2, device="meta"))
    names = ", ".join(sorted([str(net[0].weight.device), "meta"]))
    allowed = rf"several devices \({re.escape(names)}\).*model\.to\(device\)"
    refused(NotImplementedError, allowed, model=net)
    with pytest.raises(NotImplementedError, match="several devices"):
        IRWOptimizer(SGD(net.parameters()), alpha=0.3)
    refused(NotImplementedError, "several devices", SGD(net[0].parameters()), model=net)
    net[1].requires_grad_(False)
    optimizer = IRWOptimizer(SGD(net[0].parameters()), alpha=0.3, model=net)
    net[1].requires_grad_()
    with pytest.raises(NotImplementedError, match="several devices"):
        optimizer.add_param_group({"params": net[1].parameters()})
    assert len(optimizer.param_groups) == 1


def test_backward_without_the_model_whose_rows_opacus_makes() -> None:
    net = model()
    optimizer = IRWOptimizer(SGD(net.parameters()), alpha=0.3, engine="grad_sample")
    losses = net(torch.randn(8, 4)).square().sum(1)
    with pytest.raises(ValueError, match=r"engine='grad_sample' .*step\(losses=losses\); or leave"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("engine", ["ghost", "autodiff"])
def test_a_step_with_losses_by_an_engine_that_makes_the_rows(engine: str) -> None:
    net = model()
    optimizer = IRWOptimizer(SGD(net.parameters()), alpha=0.3, engine=engine)
    losses = net(torch.randn(8, 4)).square().sum(1)
    losses.mean().backward()
    before = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=rf"engine='{engine}' .*engine='grad_sample'"):
        optimizer.step(losses=losses)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_a_criterion_attached_to_an_optimizer_of_another_model() -> None:
    net, other, criterion = model(), model(), nn.CrossEntropyLoss()
    first = IRWOptimizer(SGD(net.parameters(), lr=0.1), alpha=0.3, model=net, criterion=criterion)
    hooks = {m: dict(m._forward_hooks) for m in other.modules()}
    sgd = SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"attached to another IRWOptimizer already.*detach\(\)"):
        IRWOptimizer(sgd, alpha=0.3, model=other, criterion=criterion)
    assert hooks == {m: dict(m._forward_hooks) for m in other.modules()}
    assert first.criterion is criterion
    first.detach()
    IRWOptimizer(sgd, alpha=0.3, model=other, criterion=criterion)


def test_a_forgotten_optimizer_lets_go_of_the_criterion() -> None:
    net, criterion = model(), nn.CrossEntropyLoss()
    IRWOptimizer(SGD(net.parameters(), lr=0.1), alpha=0.3, model=net, criterion=criterion)
    IRWOptimizer(SGD(net.parameters(), lr=0.1), alpha=0.3, model=net, criterion=criterion)


@pytest.mark.parametrize(
    ("losses", "match"),
    [
        (torch.zeros(()), r"losses has shape \(\): expected \(B,\)"),
        (torch.zeros(3, 2), r"losses has shape \(3, 2\)"),
        (torch.zeros(3), "do not require a gradient"),
        (torch.zeros(3, dtype=torch.int64), "dtype torch.int64"),
        ([0.1, 0.2], "expected a tensor"),
    ],
    ids=str,
)
def test_losses_that_cannot_be_used(losses: Any, match: str) -> None:
    net = model()
    optimizer = IRWOptimizer(SGD(net.parameters(), lr=0.1), alpha=0.3, model=net)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
        optimizer.backward(losses)
