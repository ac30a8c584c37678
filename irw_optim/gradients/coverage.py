"""What is known of a kind of graph: whom the ghost products cover there, and who vouches for it.

Two graphs are of one kind if the same layers and operations read the same parameters, and the same
operation, if any, may mix the samples. What a comparison with autograd has shown for one holds for
every other that reads its parameters likewise: skipped blocks make many kinds out of few readings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from irw_optim.gradients.graph import Graph
from irw_optim.gradients.mixing import Batch


@dataclass(eq=False)
class Trust:
    """What comparisons have shown, for graphs in which the same operation may mix the samples."""

    proven: set[Hashable] = field(default_factory=set)  # ways of reading that agreed with autograd
    lost: set[Tensor] = field(default_factory=set)  # parameters on which autograd disagreed
    uses: int = 0  # graphs that have relied on it


@dataclass(eq=False)
class Covering:
    """Which parameters the ghost products cover, and when to look whether they still do."""

    covered: set[Tensor]  # the parameters that only layers with a rule read
    covers_all: bool  # nothing is left for autograd
    mixed_by: str | None  # the operation that may mix the samples; None where none can
    reads: frozenset[Hashable]  # the ways of reading parameters
    trust: Trust  # what is known of these
    alone: set[Tensor]  # what nothing but covered layers read, as the graph shows
    reached: set[int] = field(default_factory=set)  # numbers of calls that a gradient arrived at
    is_settled: bool = False  # whether checks alone can show that anything is left to autograd

    def __post_init__(self) -> None:
        self.lose(self.trust.lost)

    @property
    def reason(self) -> str:
        """Why some parameters are left to autograd."""
        if self.mixed_by is not None:
            return f"samples may meet in the forward (at {self.mixed_by})"
        return "an operation reads them of which no quick products are known"

    def agree(self) -> None:
        """Take note that autograd agreed."""
        self.trust.proven |= self.reads

    def lose(self, parameters: Iterable[Tensor]) -> None:
        """Leave these parameters to autograd from now on."""
        lost = set(parameters)
        self.trust.lost |= lost
        self.covers_all = self.covers_all and self.covered.isdisjoint(lost)
        self.covered -= lost
        self.is_settled = False


def covering_of(
    graph: Graph,
    own: Sequence[Tensor],
    batch: Batch,
    reads: Iterable[Hashable],
    trust: Trust,
) -> Covering:
    """Who covers what in a graph of a new kind."""
    inside: set[Tensor] = set()
    outside: set[Tensor] = set()
    calls = [site.call for site in graph.sites]
    for call in calls:
        (inside if call.layout is not None else outside).update(call.parameters.values())
    covered = inside.difference(outside).intersection(own)
    covers_all = covered.issuperset(own) and covered.issuperset(inside | outside)
    sparse = any(call.needs_autograd_combine for call in calls)
    layers = Counter(p for call in calls for p in call.parameters.values())
    counted = dict(zip(graph.leaves, batch.reads, strict=False))
    alone = {p for p in covered if counted.get(p) == layers[p]}
    covers_all = covers_all and not sparse
    return Covering(covered, covers_all, batch.mixed_by, frozenset(reads), trust, alone)


def reads_of(graph: Graph, own: Sequence[Tensor], batch: Batch) -> list[Hashable]:
    """The ways in which parameters are read: by which layers, and by how many operations."""
    by_layers: list[Hashable] = [
        (type(call), *call.arrangement(), *map(_name, call.parameters.values()))
        for call in (site.call for site in graph.sites)
    ]
    mine = set(own)
    counted = zip(graph.leaves, batch.reads, strict=False)
    return [*by_layers, *[(_name(leaf), reads) for leaf, reads in counted if leaf in mine]]


def _name(tensor: Tensor) -> int:
    """Of a tensor that outlives a step; what is computed in the forward has none."""
    return id(tensor) if tensor.is_leaf else 0
