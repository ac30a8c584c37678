"""`verify`: is the optimizer exact on this model, and what does it cost?

The first thing to call on a new model. One batch, compared with a loop of plain autograd over its
samples; the model, its buffers, gradients and every source of chance are left as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from irw_optim.criterion import per_sample_losses
from irw_optim.distributed.shard_checks import check_whole
from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.gradients.capture import walk
from irw_optim.gradients.materialized import as_vector
from irw_optim.measure import median_seconds, peak_bytes
from irw_optim.optimizer import IRWOptimizer
from irw_optim.optimizer.attach import check_unattached
from irw_optim.restored import restored
from irw_optim.weighting import Alignment, weigh
from irw_optim.weighting.outliers import OutlierFilter

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_OF_HALF = 5e-2


@dataclass(frozen=True)
class Verification:
    """What `verify` found; print it.

    Attributes:
        engines: for each module that owns trainable parameters, ``"ghost"`` or ``"autodiff"``.
        errors: relative error of ``scores``, ``weights`` and ``gradient`` against the loop.
        tolerance: what counts as equal in the dtype of the losses.
        time_ratio: median time of a step over that of a plain step.
        memory_ratio: peak of the tensors that a step makes, over that of a plain step; NaN where
            that cannot be measured.
        deterministic: whether two passes from one state give the same losses; where they do not,
            the errors say nothing.
    """

    engines: dict[str, str]
    errors: dict[str, float]
    tolerance: float
    time_ratio: float
    memory_ratio: float
    deterministic: bool = True

    @property
    def exact(self) -> bool:
        """Whether every error is rounding; False where there was nothing to compare with."""
        return self.deterministic and all(e <= self.tolerance for e in self.errors.values())

    def __str__(self) -> str:
        width = max(len("module"), *(len(name) for name in self.engines))
        lines = [f"{'module':<{width}}  engine"]
        lines += [f"{name:<{width}}  {engine}" for name, engine in self.engines.items()]
        lines += ["", "relative error against a loop of plain autograd over the samples"]
        lines += [f"  {name:<9} {error:.1e}" for name, error in self.errors.items()]
        lines += [
            f"time of a step   {self.time_ratio:.2f} x plain",
            f"peak memory      {self.memory_ratio:.2f} x plain",
            self._verdict(),
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.deterministic:
            return (
                "NOT DETERMINISTIC: two passes from one state give other losses, so there is "
                "nothing to compare with. Draw from torch's generators, random, numpy.random, or "
                "a generator that is an attribute of a module"
            )
        return f"{'EXACT' if self.exact else 'NOT EXACT'} (tolerance {self.tolerance:.0e})"


def verify(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    targets: Any,
    criterion: nn.Module,
    *,
    alpha: float = 0.2,
    outliers: OutlierFilter | None = None,
    engine: str = "auto",
    repeats: int = 5,
) -> Verification:
    """Run one batch through `IRWOptimizer` and through a loop over its samples, and compare.

    Args:
        model: as it will be trained, in train mode or with parts in eval mode.
        inputs: one batch; a tuple is passed as positional arguments, a mapping by name.
        targets: second argument of the criterion.
        criterion: the loss module.
        alpha: as for `IRWOptimizer`.
        outliers: as for `IRWOptimizer`.
        engine: as for `IRWOptimizer`.
        repeats: timed rounds; the loop itself takes B backward passes once.

    Raises:
        TypeError, ValueError: as `IRWOptimizer` does.
        NotImplementedError: a model under `fully_shard`.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    >>> report = verify(model, x, y, nn.CrossEntropyLoss())
    >>> report.exact, report.engines
    (True, {'0': 'ghost', '2': 'ghost'})
    """
    check_whole(model, "verify")
    check_unattached(criterion)  # or the optimizer that has it would lose it
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device if parameters else torch.device("cpu")

    def forward() -> Any:
        fresh = tree_map(_copy, dict(inputs) if isinstance(inputs, Mapping) else inputs)
        if isinstance(fresh, dict):
            return model(**fresh)
        return model(*fresh) if isinstance(fresh, tuple) else model(fresh)

    def plain_step() -> None:
        model.zero_grad()
        criterion(forward(), targets).backward()

    with restored(model, criterion):
        inner = torch.optim.SGD(parameters, lr=0.0)
        optimizer = IRWOptimizer(
            inner, alpha=alpha, model=model, criterion=criterion, outliers=outliers, engine=engine
        )
        try:
            with restored(model, criterion):
                plain_step()
                record = optimizer.last_step
                gradients = {p: p.grad for p in parameters}
            covered = optimizer.engine.covered_parameters()
            times = median_seconds([plain_step], repeats, device=device)
            memory = peak_bytes(plain_step, device)
        finally:
            optimizer.detach()
        if record is None:
            raise RuntimeError(
                "the criterion made no weighted gradient: expected the model in train mode and "
                "a loss that depends on its parameters"
            )
        plain_time = median_seconds([plain_step], repeats, device=device)[0]
        plain_memory = peak_bytes(plain_step, device)
    with restored(model, criterion):
        again = per_sample_losses(criterion, forward(), targets).losses.detach()
    with restored(model, criterion):
        batch = per_sample_losses(criterion, forward(), targets)
        reached = set(walk(batch.losses).leaves)
        scored = [p for p in parameters if p in reached]
        rows = AutodiffGradients(batch.losses, scored, {"row_by_row": True})
        truth = weigh(batch.losses.detach(), rows, alpha, Alignment(), outliers=outliers)
        expected = rows.combine(truth.weights * batch.scale)
    found = [torch.zeros_like(p) if (g := gradients[p]) is None else g.to_dense() for p in scored]
    errors = {
        "scores": _relative(record.scores, truth.scores),
        "weights": _relative(record.weights, truth.weights),
        "gradient": _relative(_flat(found), _flat([expected[p] for p in scored])),
    }
    lowest = {t.dtype.to_real() for t in (batch.losses, *parameters)}
    tolerance = max(_TOLERANCE.get(d, _TOLERANCE_OF_HALF) for d in lowest)
    passes = (again, record.losses)
    return Verification(
        _engines_by_module(model, covered),
        errors,
        tolerance,
        _ratio(times[0], plain_time),
        _ratio(memory, plain_memory),
        all(_relative(other, batch.losses.detach()) <= tolerance for other in passes),
    )


def _copy(value: Any) -> Any:
    """A forward may change its input in place, and meets it again here."""
    return value.clone() if isinstance(value, Tensor) else value


def _ratio(measured: float, plain: float) -> float:
    return measured / plain if plain else nan


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([as_vector(t) for t in tensors])


def _relative(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    difference = float((found.to(expected.dtype) - expected).norm())
    return difference / size if size else difference


def _engines_by_module(model: nn.Module, covered: set[Tensor]) -> dict[str, str]:
    engines = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            kinds = {"ghost" if p in covered else "autodiff" for p in own}
            engines[name or "(the model itself)"] = " and ".join(sorted(kinds, reverse=True))
    return engines
