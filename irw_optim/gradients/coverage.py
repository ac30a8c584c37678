"""Whom the ghost products cover in a kind of graph, and how autograd vouches for them.

A forward may mix samples (``h - h.mean(0)``) or use a child's weight behind its back: G^T r shows
it, for a random r. What it shows holds for every graph that reads its parameters likewise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .graph import Graph, Opaque
from .mixing import Batch
from .nodes import SHARED, pull, read_by
from .protocol import PerSampleGradients

if TYPE_CHECKING:
    from .backward_passes import BackwardPasses
    from .engine import Engine, OwnEngine


@dataclass(eq=False)
class Trust:
    """What comparisons have shown, where the same operation may mix the samples."""

    proven: set[Hashable] = field(default_factory=set)  # ways of reading that agreed with autograd
    lost: set[Tensor] = field(default_factory=set)  # what did not
    uses: int = 0  # graphs that have relied on it


@dataclass(eq=False)
class Covering:
    """Which parameters the ghost products cover, and when to look whether they still do."""

    covered: set[Tensor]  # what only layers with a rule read
    covers_all: bool  # whether nothing is left for autograd
    mixed_by: str | None
    reads: frozenset[Hashable]
    trust: Trust
    alone: set[Tensor]  # what covered layers alone read
    reached: set[int] = field(default_factory=set)  # numbers of calls that a gradient arrived at
    is_settled: bool = False  # whether only checks can unsettle it

    def __post_init__(self) -> None:
        self.lose(self.trust.lost)

    @property
    def reason(self) -> str:
        if self.mixed_by is not None:
            return f"samples may meet in the forward (at {self.mixed_by})"
        return "an operation reads them of which no quick products are known"

    def agree(self) -> None:
        self.trust.proven |= self.reads

    def lose(self, parameters: Iterable[Tensor]) -> None:
        lost = set(parameters)
        self.trust.lost |= lost
        self.covers_all = self.covers_all and self.covered.isdisjoint(lost)
        self.covered -= lost
        self.is_settled = False


def covering_of(
    graph: Graph, own: Sequence[Tensor], batch: Batch, reads: Iterable[Hashable], trust: Trust
) -> Covering:
    """Who covers what in a new kind of graph."""
    calls = [site.call for site in graph.sites]
    uses = Counter(p for call in calls for p in call.parameters.values())
    outside = {p for call in calls if call.layout is None for p in call.parameters.values()}
    covered = (uses.keys() - outside).intersection(own)
    sparse = any(call.needs_autograd_combine for call in calls)
    covers_all = covered.issuperset((*own, *uses)) and not sparse
    counted = dict(zip(graph.leaves, batch.reads, strict=False))
    alone = {p for p in covered if counted.get(p) == uses[p]}
    return Covering(covered, covers_all, batch.mixed_by, frozenset(reads), trust, alone)


def reads_of(graph: Graph, own: Sequence[Tensor], batch: Batch) -> list[Hashable]:
    """By which layers parameters are read, and by how many operations."""
    calls, mine = [site.call for site in graph.sites], set(own)
    counted = zip(graph.leaves, batch.reads, strict=False)
    return [
        *((type(c), *c.arrangement(), *map(_name, c.parameters.values())) for c in calls),
        *((_name(leaf), reads) for leaf, reads in counted if leaf in mine),
    ]


def _name(tensor: Tensor) -> int:
    """What is computed in the forward does not outlive a step."""
    return id(tensor) if tensor.is_leaf else 0


_TOLERANCE = {torch.float64: 1e-6, torch.float16: 5e-2, torch.bfloat16: 1.5e-1}
"""Far above rounding, also where terms cancel; far below what mixing does."""

_OF_PRODUCTS = {"highest": 1e-3, "high": 1e-2, "medium": 3e-2}
"""For float32, by how torch multiplies it: TF32 has the digits of float16."""

_NOISE = 1e-2
"""Share of the whole gradient below which one is noise: of a bias before a normalisation."""


def probe_of(losses: Tensor, random: torch.Generator) -> Tensor:
    """Random weights for the samples, (B,)."""
    probe = torch.randn(len(losses), generator=random, dtype=torch.float64, device="cpu")
    return probe.to(losses.device, losses.dtype)


def compare(
    parameters: Sequence[Tensor],
    truth: Sequence[Tensor | None],
    probe: Tensor,
    gradients: PerSampleGradients,
) -> dict[Tensor, float]:
    """The relative error of each parameter whose G^T r, for r of (B,), is not the true gradient."""
    claim = gradients.combine(probe)
    return wrong_among(differences(parameters, truth, list(map(claim.get, parameters)), gradients))


def in_half_precision(gradients: PerSampleGradients) -> bool:
    """Whether any layer's gradient is."""
    return not _dtypes(gradients).isdisjoint((torch.float16, torch.bfloat16))


class Difference(NamedTuple):
    """How far a parameter's gradient is off."""

    parameter: Tensor
    error: float  # a norm
    size: float  # the gradient's
    tolerance: float


def differences(
    parameters: Sequence[Tensor],
    truth: Sequence[Tensor | None],
    claim: Sequence[Tensor | None],
    gradients: PerSampleGradients | None = None,
) -> list[Difference]:
    """From autograd's gradients; a device is waited for once."""
    pairs = zip(parameters, truth, strict=True)
    true = [torch.zeros_like(p) if t is None else t.to_dense() for p, t in pairs]
    off = [_norm(t if c is None else t - c.to_dense()) for t, c in zip(true, claim, strict=True)]
    norms = torch.stack([*off, *map(_norm, true)]).tolist() if true else []
    dtypes = _dtypes(gradients)
    tolerances = [max(map(_tolerance, (t.dtype, *dtypes))) for t in true]
    return list(map(Difference, parameters, norms[: len(true)], norms[len(true) :], tolerances))


def wrong_among(found: Sequence[Difference]) -> dict[Tensor, float]:
    """The relative error of each parameter that disagrees."""
    total = math.hypot(*(d.size for d in found))
    wrong: dict[Tensor, float] = {}
    for parameter, error, size, tolerance in found:
        unit = max(size, _NOISE * total)
        if error > tolerance * unit:
            wrong[parameter] = error / unit if unit else math.inf
    return wrong


def equal(
    parameters: Sequence[Tensor], some: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> bool:
    """Whether two passes gave the same gradients, to rounding."""
    if any((a is None) is not (b is None) for a, b in zip(some, others, strict=True)):
        return False
    return not wrong_among(differences(parameters, some, others))


@contextmanager
def watching(
    opaque: Opaque, graph: Graph, losses: Tensor, random: torch.Generator
) -> Iterator[list[Tensor]]:
    """Flags of the nodes that do not answer for each sample alone, in autograd's next pass.

    Those that do pull r u back to r times what they make of u, for random r of the samples, (B,).
    """
    flags: list[Tensor] = []
    probe = probe_of(losses, random) if opaque else losses

    def times_probe(values: Tensor, stride: int) -> Tensor:
        factors = probe.to(values.dtype).view(1, -1, 1)
        return (values.reshape(-1, len(probe), stride) * factors).view(values.shape)

    def compare(place: int, gradients: Sequence[Any], arrived: Sequence[Any]) -> None:
        node, (made, read) = graph.order[place], opaque[place]
        us = list(arrived)
        for number, stride in made.items():
            us[number] = None if us[number] is None else times_probe(us[number], stride)
        scaled = pull(node, us)
        for number, stride in read.items():
            pair = [g for g in (gradients[number], scaled[number]) if g is not None]
            if pair and stride > SHARED and pair[0].numel():
                shape = read_by(node, number).shape
                truth = times_probe(pair[0].sum_to_size(shape), stride)
                error = (pair[-1].sum_to_size(shape) - truth).abs().max()
                flags.append(error > _tolerance(truth.dtype) * truth.abs().max())

    hooks = [graph.order[place].register_hook(partial(compare, place)) for place in opaque]
    try:
        yield flags
    finally:
        for hook in hooks:
            hook.remove()


def _norm(tensor: Tensor) -> Tensor:
    """0-dim and wide, of numbers whose squares float32 may not hold."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    if not tensor.numel():
        return torch.zeros((), dtype=wide, device=tensor.device)
    size = tensor.abs().max()
    unit = torch.where(size == 0, torch.ones_like(size), size)
    norm: Tensor = size.to(wide) * (tensor / unit).abs().float().norm().to(wide)
    return norm


def _tolerance(dtype: torch.dtype) -> float:
    if dtype != torch.float32:
        return _TOLERANCE.get(dtype, 1e-3)
    try:
        precision = torch.get_float32_matmul_precision()
        if precision == "highest" and torch.cuda.is_available() and torch.backends.cudnn.allow_tf32:
            precision = "high"
    except RuntimeError:  # set by torch's newer names
        precision = "high"
    return _OF_PRODUCTS[precision]


def _dtypes(gradients: PerSampleGradients | None) -> set[torch.dtype]:
    return {call.precision for call in getattr(gradients, "calls", ())}


def rows_by(
    engine: Engine, own: OwnEngine, losses: Tensor, chosen: Sequence[Tensor], passes: BackwardPasses
) -> PerSampleGradients:
    """The user's ``own``, compared with autograd at uses 1, 2, 4, 8, ..."""
    with torch.enable_grad():
        rows = own(losses, chosen)
    if engine.uses & (engine.uses - 1) == 0:
        probe = probe_of(losses, engine.random)
        if wrong := compare(chosen, passes.without_hooks(chosen, probe), probe, rows):
            raise RuntimeError(
                f"engine={own!r} is not exact for {engine.names_of(wrong)}: combine(w) differs "
                f"from autograd by {max(wrong.values()):.2g} of the gradient; expected the sum of "
                'w_i times the gradient of loss i, or engine="auto"'
            )
    return rows
