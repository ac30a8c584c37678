"""Ways to take the same IRW step: ours, and what one can build from neighbouring libraries.

Every method computes the per-sample losses, g_S, the scores, the weights and the weighted gradient
of one batch exactly, and lets SGD step. Each returns a function that does one step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.training import cross_entropy as losses_of
from benchmarks.training import step
from irw_optim import DBSCANFilter, IRWOptimizer, irw_weights
from irw_optim.gradients import MaterializedGradients

Step = Callable[[], None]
Method = Callable[[nn.Module, Tensor, Tensor], Step]
ALPHA = 0.2


def stepping(optimizer: torch.optim.Optimizer, backward: Callable[[], object]) -> Step:
    def taken() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return taken


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-4)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return partial(step, model, nn.CrossEntropyLoss(), _sgd(model), x, y)


def ours(**options: Any) -> Method:
    """IRWOptimizer with the one line."""

    def method(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        criterion = nn.CrossEntropyLoss()
        shared = {"alpha": ALPHA, "model": model, "criterion": criterion}
        optimizer = IRWOptimizer(_sgd(model), **shared, **options)
        return partial(step, model, criterion, optimizer, x, y)

    return method


def opacus(**options: Any) -> Method:
    """Materialised rows by Opacus, weights and step by our grad_sample engine."""

    def method(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        from opacus import GradSampleModule
        from opacus.validators import ModuleValidator

        if ModuleValidator.validate(model, strict=False):
            model = ModuleValidator.fix(model)
        wrapped = GradSampleModule(model, **options)
        optimizer = IRWOptimizer(_sgd(wrapped), alpha=ALPHA)

        def taken() -> None:
            optimizer.zero_grad()
            losses = losses_of(wrapped(x), y)
            losses.mean().backward()
            optimizer.step(losses=losses)

        return taken

    return method


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """torch.func: vmap(grad) over the samples."""
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.func.functional_call(model, values, (sample.unsqueeze(0),))
        value = cross_entropy(output, target.unsqueeze(0))
        return value, value

    one = torch.func.grad(loss, has_aux=True)
    per_sample = torch.func.vmap(one, in_dims=(None, 0, 0), randomness="different")

    def backward() -> None:
        rows, losses = per_sample({name: p.detach() for name, p in parameters.items()}, x, y)
        _set_gradient({parameters[name]: block for name, block in rows.items()}, losses)

    return stepping(_sgd(model), backward)


def torchjd(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """TorchJD's Gramian engine, then one weighted backward pass."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)

    def backward() -> None:
        losses = losses_of(model(x), y)
        gram = engine.compute_gramian(losses)
        members = losses.detach().topk(max(1, -(-len(losses) * 2 // 10))).indices  # ceil(0.2 B)
        scores = gram[:, members].sum(1).clamp(min=0)
        losses.backward(scores / scores.sum())

    return stepping(_sgd(model), backward)


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    from backpack import backpack as collecting
    from backpack import extend
    from backpack.extensions import BatchGrad

    model, criterion = extend(model), extend(nn.CrossEntropyLoss())

    def backward() -> None:
        output = model(x)
        losses = losses_of(output.detach(), y)
        with collecting(BatchGrad()):
            criterion(output, y).backward()
        _set_gradient({p: p.grad_batch * len(x) for p in model.parameters()}, losses)

    return stepping(_sgd(model), backward)


def _set_gradient(rows: dict[Any, Tensor], losses: Tensor) -> None:
    gradients = MaterializedGradients(rows)
    weights = irw_weights(losses.detach(), gradients, ALPHA)
    for parameter, gradient in gradients.combine(weights).items():
        parameter.grad = gradient


METHODS: dict[str, Method] = {
    "plain": plain,
    "ours, ghost": ours(),
    "ours, IRWO": ours(outliers=DBSCANFilter()),
    "ours, autodiff": ours(engine="autodiff"),
    "Opacus hooks": opacus(),
    "Opacus functorch": opacus(force_functorch=True),
    "TorchJD": torchjd,
    "torch.func": torch_func,
    "BackPACK": backpack,
}
