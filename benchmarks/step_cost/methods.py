"""Ways to take the same IRW step: ours, and what one can build from neighbouring libraries.

Every method computes the per-sample losses, g_S, the scores, the weights and the weighted gradient
of one batch exactly, and lets SGD step. Each returns a function that does one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irw_optim import DBSCANFilter, IRWOptimizer, irw_weights
from irw_optim.gradients import MaterializedGradients

Step = Callable[[], None]
ALPHA = 0.2


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """An ordinary step of SGD."""
    optimizer = _sgd(model)
    criterion = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def ours(**options: Any) -> Callable[[nn.Module, Tensor, Tensor], Step]:
    """IRWOptimizer with the one line."""

    def method(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        criterion = nn.CrossEntropyLoss()
        optimizer = IRWOptimizer(
            _sgd(model), alpha=ALPHA, model=model, criterion=criterion, **options
        )

        def step() -> None:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

        return step

    return method


def opacus(mode: str) -> Callable[[nn.Module, Tensor, Tensor], Step]:
    """Materialised rows by Opacus, weights and step by our grad_sample engine."""

    def method(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        from opacus import GradSampleModule
        from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
        from opacus.validators import ModuleValidator

        if ModuleValidator.validate(model, strict=False):
            model = ModuleValidator.fix(model)
        kind = GradSampleModuleExpandedWeights if mode == "ew" else GradSampleModule
        extra = {"force_functorch": True} if mode == "functorch" else {}
        wrapped = kind(model, **extra)
        optimizer = IRWOptimizer(_sgd(wrapped), alpha=ALPHA)

        def step() -> None:
            optimizer.zero_grad()
            losses = F.cross_entropy(wrapped(x), y, reduction="none")
            losses.mean().backward()
            optimizer.step(losses=losses)

        return step

    return method


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """torch.func: vmap(grad) over the samples."""
    optimizer = _sgd(model)
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.func.functional_call(model, values, (sample.unsqueeze(0),))
        value = F.cross_entropy(output, target.unsqueeze(0))
        return value, value

    per_sample = torch.func.vmap(
        torch.func.grad(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different"
    )

    def step() -> None:
        optimizer.zero_grad()
        values = {name: p.detach() for name, p in parameters.items()}
        rows, losses = per_sample(values, x, y)
        _set_gradient({parameters[name]: block for name, block in rows.items()}, losses)
        optimizer.step()

    return step


def torchjd(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """TorchJD's Gramian engine, then one weighted backward pass."""
    from torchjd.autogram import Engine

    optimizer = _sgd(model)
    engine = Engine(model, batch_dim=0)

    def step() -> None:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        gram = engine.compute_gramian(losses)
        members = losses.detach().topk(_count(len(losses))).indices
        scores = gram[:, members].sum(1).clamp(min=0)
        losses.backward(scores / scores.sum())
        optimizer.step()

    return step


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Materialised rows by BackPACK."""
    from backpack import backpack as collecting
    from backpack import extend
    from backpack.extensions import BatchGrad

    model = extend(model)
    criterion = extend(nn.CrossEntropyLoss())
    optimizer = _sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        losses = F.cross_entropy(output.detach(), y, reduction="none")
        with collecting(BatchGrad()):
            criterion(output, y).backward()
        rows = {p: p.grad_batch * len(x) for p in model.parameters()}  # type: ignore[attr-defined]
        _set_gradient(rows, losses)
        optimizer.step()

    return step


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Step]] = {
    "plain": plain,
    "ours, ghost": ours(),
    "ours, IRWO": ours(outliers=DBSCANFilter()),
    "ours, autodiff": ours(engine="autodiff"),
    "Opacus hooks": opacus("hooks"),
    "Opacus functorch": opacus("functorch"),
    "TorchJD": torchjd,
    "torch.func": torch_func,
    "BackPACK": backpack,
}


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-4)


def _count(size: int) -> int:
    return max(1, -(-size * 2 // 10))  # ceil(0.2 B)


def _set_gradient(rows: dict[Any, Tensor], losses: Tensor) -> None:
    gradients = MaterializedGradients(rows)
    weights = irw_weights(losses.detach(), gradients, ALPHA)
    for parameter, gradient in gradients.combine(weights).items():
        parameter.grad = gradient
