"""`verify`: is the optimizer exact on a model, and what does it cost?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from math import nan
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from irw_optim.arguments import whole_number
from irw_optim.criterion import PerSampleLosses, per_sample_losses, validate_criterion
from irw_optim.criterion.attached import check_unattached
from irw_optim.gradients.autodiff import AutodiffGradients
from irw_optim.gradients.graph import walk
from irw_optim.gradients.protocol import as_vector
from irw_optim.notebook import html_table
from irw_optim.optimizer import IRWOptimizer
from irw_optim.optimizer.options import check_model
from irw_optim.restored import restored
from irw_optim.torch_internals import check_whole
from irw_optim.weighting import Alignment, LocalScheme, StepRecord
from irw_optim.weighting.outliers import OutlierFilter

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # and 0.05 in half precision


@dataclass(frozen=True)
class Verification:
    """What `verify` found; print it.

    Attributes:
        engines: ``"ghost"`` or ``"autodiff"`` for each module with trainable parameters.
        errors: relative ones of ``scores``, ``weights`` and ``gradient``.
        tolerance: what counts as equal in the dtype of the losses.
        time_ratio: median time of a step over that of a plain step.
        memory_ratio: the same of the peak of a step's tensors; NaN if not measured.
        deterministic: whether two passes from one state give the same losses; if not, the errors
            say nothing.
        reason: why some modules have no quick products, or "".
        plain_seconds: median time of a plain step.
        one_by_one: how many samples take a backward pass each.
    """

    engines: dict[str, str]
    errors: dict[str, float]
    tolerance: float
    time_ratio: float
    memory_ratio: float
    deterministic: bool = True
    reason: str = ""
    plain_seconds: float = nan
    one_by_one: int = 0

    @property
    def exact(self) -> bool:
        """Whether every error is rounding."""
        return self.deterministic and all(e <= self.tolerance for e in self.errors.values())

    def __str__(self) -> str:
        table = {"module": "engine", **self.engines}
        width = max(map(len, table))
        lines = [self.verdict, *(f"  {line}" for line in self._advice()), ""]
        lines += [f"{name:<{width}}  {engine}" for name, engine in table.items()]
        lines += ["", "relative error against a loop of plain autograd over the samples"]
        lines += [f"  {name:<9} {error:.1e}" for name, error in self.errors.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        errors = [(name, f"{error:.1e}") for name, error in self.errors.items()]
        said = "".join(f"<p>{escape(line)}</p>" for line in (self.verdict, *self._advice()))
        engines = html_table(("module", "engine"), self.engines.items())
        header = ("against a loop over the samples", "relative error")
        return said + engines + html_table(header, errors)

    def _advice(self) -> list[str]:
        slow = [name for name, engine in self.engines.items() if engine != "ghost"]
        if not slow or not self.reason:
            return []
        shown = ", ".join(slow[:4]) + (f" and {len(slow) - 4} more" if len(slow) > 4 else "")
        takes = "two to three plain ones for it"
        way_out = "a forward in which no sample reads another one is quick"
        if self.one_by_one:
            takes = f"{self.one_by_one} backward passes for it, one a sample"
            way_out = 'score_parameters="last" or a backward that can be differentiated avoids them'
        if "BatchNorm" in self.reason:
            way_out = "GroupNorm or LayerNorm in its place, or model.eval() for it, is quick"
        elif "samples may meet" not in self.reason:
            way_out = 'score_parameters="last" scores by the last layer alone'
        why = f"{shown}, since {self.reason}; a step takes {takes}; {way_out}"
        return [f"exact but without quick products: {why}"]

    @property
    def verdict(self) -> str:
        """One line: whether the weights are right, and what a step costs."""
        if not self.deterministic:
            return (
                "NOT DETERMINISTIC: two passes from one state give other losses, so there is "
                "nothing to compare with. Draw from torch's generators, random, numpy.random, or "
                "a generator that is an attribute of a module"
            )
        return (
            f"{'' if self.exact else 'NOT '}EXACT (tolerance {self.tolerance:.0e}); a step takes "
            f"{self.time_ratio:.2f} times the time and {self.memory_ratio:.2f} times the memory of "
            f"a plain one, which takes {1000 * self.plain_seconds:.2g} ms"
        )


@torch.inference_mode(False)  # gradients, also where it is called without
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

    The model, its gradients and every source of chance are left as they were.

    Args:
        model: as it will be trained.
        inputs: one batch; a tuple is passed as positional arguments, a mapping by name.
        targets: second argument of the criterion.
        criterion: the loss module.
        alpha: as of `IRWOptimizer`.
        outliers: the same.
        engine: the same.
        repeats: timed rounds; the loop takes B backward passes once.

    Raises:
        TypeError, ValueError, FloatingPointError: as `IRWOptimizer` does.
        NotImplementedError: a model under `fully_shard`.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    >>> report = verify(model, x, y, nn.CrossEntropyLoss())
    >>> report.exact, report.engines
    (True, {'0': 'ghost', '2': 'ghost'})
    """
    check_model(model)
    check_whole(model, "verify")
    validate_criterion(criterion)
    repeats = whole_number("repeats", repeats, 1)
    if isinstance(inputs, DataLoader):
        raise TypeError(
            "inputs is a DataLoader: expected one batch, inputs, targets = next(iter(loader))"
        )
    check_unattached(criterion)  # or the optimizer that has it would lose it
    batch = _Batch(model, inputs, targets, criterion)
    if not batch.parameters:
        raise ValueError("model has no parameter with requires_grad=True: there is no gradient")
    with restored(model, criterion):
        options: Any = {"criterion": criterion, "outliers": outliers, "engine": engine}
        inner = torch.optim.SGD(batch.parameters, lr=0.0)
        optimizer = IRWOptimizer(inner, alpha=alpha, model=model, **options)
        try:
            with restored(model, criterion):
                batch.step()
                gradients: dict[Tensor, Tensor] = {
                    p: torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
                    for p in batch.parameters
                }
            record = optimizer.last_step
            if record is None:
                raise RuntimeError(
                    "the criterion made no weighted gradient: expected the model in train mode and "
                    "a loss that depends on its parameters"
                )
            record.check_finite()
            covered = optimizer.engine.covered_parameters()
            reason = "; ".join({c.reason for c in optimizer.engine.coverings.values()})
            by_rows = optimizer.engine.known.get("row_by_row", False)
            time, memory = batch.cost(repeats)
        finally:
            optimizer.detach()
        plain_time, plain_memory = batch.cost(repeats)
    with restored(model, criterion):
        truth, expected = _by_loop(batch, LocalScheme(alpha, Alignment(), outliers))
    with restored(model, criterion):
        again = batch.losses().losses.detach()
    errors = {
        "scores": _relative(record.scores, truth.scores),
        "weights": _relative(record.weights, truth.weights),
        "gradient": _relative(_flat(gradients[p] for p in expected), _flat(expected.values())),
    }
    lowest = {t.dtype.to_real() for t in (truth.losses, *batch.parameters)}
    tolerance = max(_TOLERANCE.get(d, 0.05) for d in lowest)
    return Verification(
        _engines_by_module(model, covered),
        errors,
        tolerance,
        time / plain_time,
        memory / plain_memory if plain_memory else nan,
        all(_relative(other, truth.losses) <= tolerance for other in (again, record.losses)),
        reason if any(p not in covered for p in batch.parameters) else "",
        plain_time,
        len(again) if by_rows else 0,
    )


class _Batch:
    def __init__(self, model: nn.Module, inputs: Any, targets: Any, criterion: nn.Module) -> None:
        self.model, self.targets, self.criterion = model, targets, criterion
        self.inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")

    def output(self) -> Any:
        # A forward may change its input in place.
        fresh = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self.inputs)
        if isinstance(fresh, dict):
            return self.model(**fresh)
        return self.model(*fresh) if isinstance(fresh, tuple) else self.model(fresh)

    def losses(self) -> PerSampleLosses:
        return per_sample_losses(self.criterion, self.output(), self.targets)

    def step(self) -> None:
        self.model.zero_grad()
        self.criterion(self.output(), self.targets).backward()

    def cost(self, repeats: int) -> tuple[float, int]:
        times = []
        for _ in range(repeats + 1):
            wait(self.device)
            start = perf_counter()
            self.step()
            wait(self.device)
            times.append(perf_counter() - start)
        return median(times[1:]), peak_bytes(self.step, self.device)


def _by_loop(batch: _Batch, scheme: LocalScheme) -> tuple[StepRecord, dict[Tensor, Tensor]]:
    """Weights and weighted gradient, sample by sample."""
    samples = batch.losses()
    reached = set(walk(samples.losses).leaves)
    scored = [p for p in batch.parameters if p in reached]
    rows = AutodiffGradients(samples.losses, scored, {"row_by_row": True})
    truth = scheme.decide(samples, rows)
    return truth, rows.combine(truth.weights * samples.scale)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([as_vector(t) for t in tensors])


def _relative(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    difference = float((found.to(expected.dtype) - expected).norm())
    return difference / size if size else difference


def _engines_by_module(model: nn.Module, covered: set[Tensor]) -> dict[str, str]:
    engines = {}
    for name, module in model.named_modules():
        own = (p for p in module.parameters(recurse=False) if p.requires_grad)
        if kinds := {"ghost" if p in covered else "autodiff" for p in own}:
            engines[name or "(the model itself)"] = " and ".join(sorted(kinds, reverse=True))
    return engines


def peak_bytes(step: Callable[[], object], device: torch.device | str | None = None) -> int:
    """The most bytes of tensors that one call holds at once on a device, beyond what stays."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    step()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()  # the profiler may miss, or not, that something older is freed: in here alone
        with torch.profiler.record_function("irw_optim: measured"):
            step()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(e.start_ns() for e in events if e.name() == "irw_optim: measured")
    memory = (e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() >= start)
    held: list[int] = list(accumulate(memory, initial=0))
    return max(held) - min(held)


def wait(device: torch.device) -> None:
    """Until it has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
