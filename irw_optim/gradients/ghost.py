"""The ghost engine: G's products from each layer's input a and output gradient b, without G."""

from collections.abc import Callable, Container, Iterable, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from .graph import CallSite, gradients_at, walk
from .layers import LayerCall, RowsCall, RowWeights
from .layers._products import gram_of_rows, summed, summed_rows
from .protocol import Direction, added
from .side_by_side import Part, side_by_side, steps_as_one

Asked: TypeAlias = tuple[int, CallSite, bool]
"""A site's number, the site, and whether its rows are made."""


class GhostGradients:
    """Per-sample gradients of layers that are linear in their parameters.

    Args:
        calls: each with its output gradient; None where none arrived.
        batch_size: B.
        seed: 0-dim factor that the output gradients carry; the products are free of it.
    """

    def __init__(self, calls: Sequence[LayerCall | None], batch_size: int, seed: Tensor) -> None:
        self.calls: list[LayerCall] = list(filter(None, calls))
        self.of_every_site = calls
        self.batch_size = batch_size
        self.seed = seed
        # Spares divisions; elsewhere looking would wait for a device.
        self._factor = None if seed.device.type == "cpu" and seed.item() == 1.0 else seed

    @cached_property
    def parts(self) -> tuple[Sequence[Part], list[LayerCall]]:
        return side_by_side(self.calls)

    @cached_property
    def reached(self) -> set[int]:
        return {number for number, call in enumerate(self.of_every_site) if call is not None}

    def restricted_to(self, parameters: Container[Tensor]) -> "GhostGradients":
        """The columns of these parameters alone."""
        calls: list[LayerCall] = []
        for call in self.calls:
            kept = {role: p for role, p in call.parameters.items() if p in parameters}
            if kept and len(kept) < len(call.parameters):
                call = copy(call)
                call.parameters = kept
            calls += [call] if kept else []
        return GhostGradients(calls, self.batch_size, self.seed)

    def combine(self, weights: Tensor, *, release: bool = False) -> dict[Tensor, Tensor]:
        """G^T w; with ``release`` each layer's a and b go as they are used."""
        rows = RowWeights(weights if self._factor is None else weights / self._factor)
        apart, meeting = map(list, map(reversed, self.parts))
        if release:
            self.calls, self.of_every_site, self.parts = [], (), ([], [])
        total: dict[Tensor, Tensor] = {}
        while apart:
            total.update(apart.pop().combine(rows))
        if meeting:
            total |= summed(meeting.pop().combine(rows) for _ in range(len(meeting)))
        return total

    def dot(self, direction: Direction) -> Tensor:
        apart, meeting = self.parts
        return self._unseeded(added(part.dot(direction) for part in (*apart, *meeting)))

    def align(self, coefficients: Tensor) -> Tensor:
        """G (G^T c), (B,), by shorter ways than g_S for small batches."""
        factor = self._factor
        rows = RowWeights(coefficients if factor is None else coefficients / factor)
        apart, meeting = self.parts
        products: list[Tensor] = []
        for part in apart:
            products.append(part.align(rows))  # noqa: PERF401 (a frame less in a small step)
        if meeting:
            combined = summed(call.combine(rows) for call in meeting)
            products += [call.dot(combined) for call in meeting]
        if len(products) <= FEW:
            total = sum(products[1:], start=products[0])
        else:
            total = torch.stack(products).sum(0)
        return total if factor is None else total / factor

    def gram(self) -> Tensor:
        groups = _sharing_parameters(self.calls)
        gram = added(g[0].gram() if len(g) == 1 else gram_of_rows(g) for g in groups)
        return self._unseeded(self._unseeded(gram))

    def rows(self, samples: slice = slice(None)) -> dict[Tensor, Tensor]:
        rows = summed_rows(self.calls, samples)
        return {p: self._unseeded(block) for p, block in rows.items()}

    def _unseeded(self, values: Tensor) -> Tensor:
        return values if self._factor is None else values / self._factor


def ghost_gradients(
    losses: Tensor,
    sites: Sequence[CallSite],
    seed: Tensor,
    *,
    retain_graph: bool,
    reached: Container[int] = (),
    backward: Callable[[list[GradientEdge]], Sequence[Tensor | None]] | None = None,
) -> GhostGradients:
    """One backward pass from the losses, (B,), to the layers' outputs.

    They carry the ``seed``, 0-dim. At sites ``reached`` by an earlier pass, rows are made as b
    arrives. The pass is ``backward``, to edges of the graph, or autograd's own.
    """
    calls: list[LayerCall | None] = [None] * len(sites)
    asked: list[Asked] = []
    edges: list[GradientEdge] = []
    waiting: dict[int, RemovableHandle] = {}
    all_plain, layers_hand_back = losses.is_cpu, False
    for number, site in enumerate(sites):
        all_plain = all_plain and site.is_plain
        makes_rows = not site.is_plain and site.call.makes_rows(site.shape)
        # A node that passes nothing on is not run, and its hooks are not called.
        if makes_rows and not retain_graph and number in reached and site.call.passes_on:
            arrival = partial(_arrive, calls, number, site)
            waiting[number] = site.edge.node.register_prehook(arrival)
        else:
            asked.append((number, site, makes_rows))
            edges.append(site.edge)
            layers_hand_back = layers_hand_back or site.call.hands_back is not None
    rounds = by_rounds(losses, asked) if layers_hand_back and backward is None else [asked]
    starts: list[Tensor | GradientEdge] = [losses]
    cotangents = [seed.to(losses.dtype).expand(losses.shape)]
    try:
        for here in rounds:
            if len(rounds) > 1:
                edges = [site.edge for _, site, _ in here]
            if backward is not None:
                gradients = backward(edges)
            elif not starts:
                break
            else:
                gradients = gradients_at(starts, edges, cotangents, retain_graph=retain_graph)
            starts, cotangents = [], []
            for (number, site, makes_rows), gradient in zip(here, gradients, strict=True):
                if gradient is None:
                    continue
                calls[number] = call = _settled(site, gradient, retain_graph, makes_rows)
                if len(rounds) > 1 and call.hands_back:
                    starts.append(call.hands_back)
                    cotangents.append(call.input_gradient())
    finally:
        for handle in waiting.values():
            handle.remove()
    if waiting and any(calls[number] is None for number in waiting):
        raise RuntimeError(
            "no gradient arrived at a layer that one arrived at before: expected a forward that "
            'uses its layers alike in every step; set engine="autodiff" for any other'
        )
    ghost = GhostGradients(calls, losses.shape[0], seed)
    if all_plain:  # a small step has no time for more
        ghost.parts = ghost.calls, []
    elif len(joined := steps_as_one(ghost.calls)) < len(ghost.calls):
        ghost.calls, ghost.reached, ghost.of_every_site = joined, ghost.reached, ()
    return ghost


def by_rounds(losses: Tensor, asked: list[Asked]) -> list[list[Asked]]:
    """By how many layers that hand back are before them; autograd need not go through those then.

    All at once, where their number depends on the way or such a layer is read elsewhere.
    """
    edges = {site.edge for _, site, _ in asked}
    layers = {s.edge.node for _, s, makes_rows in asked if s.call.hands_back and not makes_rows}
    behind: dict[Any, int] = {losses.grad_fn: 0}
    for node in walk(losses).order:
        here = behind[node] + (node in layers)
        for parent, output in node.next_functions:
            if parent is None or hasattr(parent, "variable"):
                continue
            read_elsewhere = parent in layers and GradientEdge(parent, output) not in edges
            if behind.setdefault(parent, here) != here or read_elsewhere:
                return [asked]
    rounds: list[list[Asked]] = [[] for _ in range(1 + max(behind.values()))]
    for one in asked:
        rounds[behind[one[1].edge.node]].append(one)
    return rounds


def _arrive(
    calls: list[LayerCall | None], number: int, site: CallSite, gradients: Sequence[Tensor | None]
) -> None:
    if (gradient := gradients[site.edge.output_nr]) is not None:
        calls[number] = _settled(site, gradient, retain_graph=False, makes_rows=True)


def _settled(site: CallSite, gradient: Tensor, retain_graph: bool, makes_rows: bool) -> LayerCall:
    """With its output gradient, or as rows."""
    # Another loss of the same graph has output gradients of its own.
    call = site.call.copy() if retain_graph else site.call
    if call.recorded._version != call.version:
        check_inputs([call])
    if gradient.shape != site.shape:
        gradient = gradient.reshape(site.shape)
    if site.is_plain:
        call.output_gradient = gradient
    else:
        call.set_output_gradient(gradient)
    if not makes_rows:
        return call
    rows = RowsCall(call)
    if not retain_graph:
        call.let_go()
    return rows


def check_inputs(calls: Iterable[LayerCall]) -> None:
    """Raise if the input of a layer was changed in place since it was read."""
    for call in calls:
        if call.recorded._version != call.version:
            shapes = [tuple(p.shape) for p in call.parameters.values()]
            raise RuntimeError(
                f"the input of a layer with parameters of shape {shapes} was modified in place "
                "after the layer read it: its per-sample gradients are lost; use the operation "
                "that is not in place"
            )


FEW = 3
"""So many are added one after the other."""


def _sharing_parameters(calls: Sequence[LayerCall]) -> list[list[LayerCall]]:
    """Grouped so that no parameter is in two groups."""
    uses = [p for call in calls for p in call.parameters.values()]
    if len(uses) == len(set(uses)):
        return [[call] for call in calls]
    groups: list[tuple[set[Tensor], list[LayerCall]]] = []
    for call in calls:
        own = set(call.parameters.values())
        meeting = [group for group in groups if not own.isdisjoint(group[0])]
        groups = [group for group in groups if own.isdisjoint(group[0])]
        members = [member for _, some in meeting for member in some]
        groups.append((own.union(*(known for known, _ in meeting)), [*members, call]))
    return [members for _, members in groups]
