"""Where the batch is in what each layer computes: by the sizes, and by gradients where they tie.

A sequence can be as long as the batch, a table can have as many rows, and T * B rows can be
sorted by sample or by time. No size tells these apart, but gradients do: with loss i counted u_i
times, what arrives at the numbers of sample i is u_i times what arrives otherwise. Two backward
passes to the layers in question, once for each of them, show which reading is right, or that none
is.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from irw_optim.gradients.broadcast import sites_of_sums
from irw_optim.gradients.capture import CallSite, Graph
from irw_optim.gradients.layers import Layout
from irw_optim.gradients.materialized import widened

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_TOLERANCE_OF_HALF = 5e-2

Key: TypeAlias = tuple[object, ...]
"""A layer's parameters, the dimensions of its output, and which of its calls it is."""


class Reading(NamedTuple):
    """One way to see the batch in a call: at these sites, with this layout.

    Attributes:
        sites: the call's own output, or the sums that it enters.
        layout: where the batch stands there.
        at_sums: which of the two.
    """

    sites: list[CallSite]
    layout: Layout
    at_sums: bool

    @property
    def place(self) -> tuple[Layout, bool]:
        """What tells it from other readings, whatever the sizes."""
        return self.layout, self.at_sums


class Locations:
    """Where the batch was proven to be, for the calls whose sizes leave it open."""

    def __init__(self) -> None:
        self.proven: dict[Key, tuple[Layout, bool] | None] = {}

    def arranged(
        self,
        graph: Graph,
        batch_size: int,
        losses: Tensor | None = None,
        seed: Tensor | float = 1.0,
    ) -> Graph:
        """The graph with the batch of every call brought first, where it has one.

        Args:
            graph: as it was walked.
            batch_size: B.
            losses: (B,), to decide by gradients where sizes tie; None takes the likeliest.
            seed: scale of the losses in these passes, for half precision.
        """
        chosen: list[list[CallSite]] = []
        ties: dict[int, tuple[Key, list[Reading]]] = {}
        times: dict[Key, int] = {}
        for number, site in enumerate(graph.sites):
            call = site.call
            layouts = call.layouts(batch_size, site.shape)
            chosen.append([site])
            if len(layouts) < 2 and not call.may_lack_batch:
                call.settle(layouts[0] if layouts else None, batch_size)
                continue
            key = (*call.parameters.values(), len(site.shape))
            times[key] = times.get(key, 0) + 1
            key = (*key, times[key])
            if key in self.proven:
                place = self.proven[key]
                if place is None or (place[0] in layouts and not place[1]):
                    call.settle(place and place[0], batch_size)
                    continue
            readings = [Reading([site], layout, False) for layout in layouts]
            sums = sites_of_sums(site, graph, batch_size)
            if sums is not None:
                readings.insert(0, Reading(sums[1], Layout(sums[0]), True))
            known = [r for r in readings if r.place == self.proven.get(key)]
            if len(readings) > 1 and not known:
                ties[number] = key, readings
            likeliest = [*known, *readings, None][0]
            chosen[number] = _settled(site, likeliest, batch_size)
        if ties and losses is not None and batch_size > 1:
            for number, reading in self._decided(losses, ties, seed):
                chosen[number] = _settled(graph.sites[number], reading, batch_size)
        return graph._replace(sites=[site for sites in chosen for site in sites])

    def _decided(
        self, losses: Tensor, ties: dict[int, tuple[Key, list[Reading]]], seed: Tensor | float
    ) -> Iterator[tuple[int, Reading | None]]:
        """The right reading of each, None where none is."""
        edges = [s.edge for _, readings in ties.values() for r in readings for s in r.sites]
        u = tilt(losses)
        passes = [
            torch.autograd.grad(losses, edges, weights, retain_graph=True, allow_unused=True)
            for weights in ((torch.ones_like(u) * seed).to(u.dtype), (u * seed).to(u.dtype))
        ]
        arrived = iter(zip(*passes, strict=True))
        tolerance = _TOLERANCE.get(losses.dtype, _TOLERANCE_OF_HALF)
        for number, (key, readings) in ties.items():
            errors = [
                max(_error(site, reading.layout, next(arrived), u) for site in reading.sites)
                for reading in readings
            ]
            right = [r for r, error in zip(readings, errors, strict=True) if error <= tolerance]
            best = readings[errors.index(min(errors))] if right else None
            # Where no gradient arrives (yet), all of them are right.
            if len(right) < 2 and all(map(isfinite, errors)):
                self.proven[key] = best and best.place
            yield number, best


def tilt(losses: Tensor) -> Tensor:
    """A number between 1 and 2 for each loss, no two alike: multiples of the golden ratio.

    >>> tilt(torch.zeros(3))
    tensor([1.6180, 1.2361, 1.8541])
    """
    numbers = torch.arange(1, len(losses) + 1, dtype=torch.float64, device=losses.device)
    return (1 + (numbers * 0.6180339887498949) % 1).to(losses.dtype)


def _settled(site: CallSite, reading: Reading | None, batch_size: int) -> list[CallSite]:
    sites = [site] if reading is None else reading.sites
    for chosen in sites:
        chosen.call.settle(reading and reading.layout, batch_size)
    return sites


def _error(
    site: CallSite, layout: Layout, arrived: tuple[Tensor | None, Tensor | None], u: Tensor
) -> float:
    """How far the tilted gradient is from the plain one times u, in this reading."""
    plain, tilted = (
        None if t is None else layout.bring(widened(t).reshape(site.shape), len(u)) for t in arrived
    )
    if plain is None or tilted is None:
        return 0.0
    off = tilted - plain * widened(u).view(-1, *[1] * (plain.ndim - 1))
    size = float(tilted.norm())
    return float(off.norm()) / size if size else 0.0
