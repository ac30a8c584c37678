"""The autograd graph behind a vector of losses, as it is recorded."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from irw_optim.gradients.layers import LayerCall
from irw_optim.gradients.packed import ENDS_RUN


class CallSite(NamedTuple):
    """A layer's call and the edge of the graph at which its output gradient arrives."""

    call: LayerCall
    edge: GradientEdge
    shape: torch.Size


@dataclass(eq=False)
class Graph:
    """What leads to a vector of losses."""

    leaves: list[Tensor]  # what gradients are accumulated in
    leaf_nodes: list[Node]  # what accumulates them
    order: list[Node]  # the nodes in between, each before those it reads from
    wiring: tuple[int | tuple[int, int], ...]  # who reads from whom, as numbers
    sites: list[CallSite] = field(default_factory=list)  # layer calls, as far as they are known
    kind: Hashable = None  # equal for graphs in which everything is at the same places
    common: dict[str, Any] = field(default_factory=dict)  # what is kept for all graphs of the kind

    @cached_property
    def nodes(self) -> dict[Node, int]:
        """The place of each node in the order."""
        return {node: place for place, node in enumerate(self.order)}

    @cached_property
    def leaf_numbers(self) -> dict[Node, int]:
        """The place of each leaf's node among the leaves'."""
        return {node: number for number, node in enumerate(self.leaf_nodes)}

    @cached_property
    def edges(self) -> dict[Any, GradientEdge]:
        """Where the gradients of the leaves arrive."""
        ends = [GradientEdge(node, 0) for node in self.leaf_nodes]
        return dict(zip(self.leaves, ends, strict=True))


NO_GRAPH = Graph([], [], [], ())
"""In the place of one that is over."""


def read_by(node: Any) -> Sequence[tuple[Node | None, int]]:
    """What a node reads; what a `Run` reads that ends there."""
    edges: Sequence[tuple[Node | None, int]] = node.next_functions
    return node.run.edges if type(node) is ENDS_RUN else edges  # type: ignore[attr-defined]


def walk(losses: Tensor) -> Graph:
    """Follow the graph from the losses to its leaves."""
    leaves: list[Tensor] = []
    leaf_nodes: list[Node] = []
    order: list[Node] = []
    wiring: list[int | tuple[int, int]] = []
    root = losses.grad_fn
    seen: dict[Node, int] = {} if root is None else {root: 0}
    # Depth first; a node is written down when all that it reads from is: the order, from its end.
    path = [] if root is None else [(root, iter(read_by(root)))]
    while path:
        node, parents = path[-1]
        for parent, output in parents:
            if parent is None:
                wiring.append(-1)
                continue
            number = seen.get(parent)
            if number is not None:
                wiring.append((number, output) if output else number)
                continue
            seen[parent] = number = len(seen)
            wiring.append((number, output) if output else number)
            following = read_by(parent)
            if not following and (leaf := getattr(parent, "variable", None)) is not None:
                leaves.append(leaf)
                leaf_nodes.append(parent)
                continue
            path.append((parent, iter(following)))
            break
        else:
            path.pop()
            order.append(node)
    order.reverse()
    return Graph(leaves, leaf_nodes, order, tuple(wiring))


def refuse_reentrant_checkpoints(nodes: Iterable[Node]) -> None:
    """Raise where a part is recomputed by a backward pass of its own, which nobody can ask."""
    if "CheckpointFunctionBackward" in {kind.__name__ for kind in set(map(type, nodes))}:
        raise RuntimeError(
            "torch.utils.checkpoint with use_reentrant=True: it adds to p.grad from inside the "
            "backward pass, so that no gradient of single samples can be had. Call "
            "checkpoint(..., use_reentrant=False), with Hugging Face "
            'gradient_checkpointing_kwargs={"use_reentrant": False}: the same gradients for the '
            "same memory"
        )
