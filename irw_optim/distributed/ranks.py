"""The processes that train one model, and the few things that they tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from irw_optim.gradients.materialized import numbers_of

# Renamed in torch 2.13, which warns of the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """The processes of a group. Every method is a collective: all of them must call it.

    Args:
        group: the process group; None for the default one.
        options: what has to be equal on all ranks; compared once.

    Attributes:
        sizes: how many samples each rank has in the batch at hand, since the last `gather_rows`.
    """

    def __init__(self, group: Any = None, options: Mapping[str, Any] | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.number = dist.get_world_size(group)
        self.sizes: list[int] = [0] * self.number
        self._capacity = 0
        self._to_compare = dict(options or {})

    @property
    def own(self) -> slice:
        """Which samples of the batch of all ranks are this one's."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather_rows(
        self, header: Sequence[float], rows: Tensor
    ) -> tuple[list[list[float]], Tensor]:
        """One header a rank, equally long on all, and the rows (n, c) of all, float64.

        One all-gather: nobody knows how many rows the others have, so a message has room for as
        many as any rank ever had, and only where that is too few is there a second one.
        """
        self._compare_options()
        size, width = rows.shape
        front = rows.new_tensor([size, *header], device="cpu").to(rows.device)
        while True:
            room = rows.new_zeros(self._capacity * width)
            if size <= self._capacity:
                room[: rows.numel()] = rows.flatten()
            messages = self._gathered(torch.cat([front, room]))
            fronts = messages[:, : len(front)].tolist()
            self.sizes = [int(front[0]) for front in fronts]
            if max(self.sizes) <= self._capacity:
                break
            self._capacity = max(self.sizes)  # the same on every rank, as the sizes are
        bodies = messages[:, len(front) :].view(self.number, self._capacity, width)
        joined = [body[:n] for body, n in zip(bodies, self.sizes, strict=True)]
        return [front[1:] for front in fronts], torch.cat(joined)

    def gather(self, values: Tensor) -> Tensor:
        """The values (n, ...) of every sample of the batch, n being this rank's `sizes`."""
        most = max(self.sizes)
        room = values.new_zeros(most, *values.shape[1:])
        room[: len(values)] = values
        bodies = self._gathered(room)
        return torch.cat([body[:n] for body, n in zip(bodies, self.sizes, strict=True)])

    def each(self, numbers: Tensor) -> Tensor:
        """The numbers of every rank, equally many on each: (number, *numbers.shape)."""
        self._compare_options()
        return self._gathered(numbers)

    def total(
        self, parts: Mapping[Tensor, Tensor], layout: Sequence[Tensor], rows: tuple[int, ...] = ()
    ) -> dict[Tensor, Tensor]:
        """The sum over ranks of vectors with one part a parameter, in float32 or better.

        The parameters of the layout, in an order that all ranks have, make one message; a missing
        part counts as 0. Parts may have ``rows``, dimensions in front of the parameter's own.
        """
        double = any(p.dtype.to_real() == torch.float64 for p in layout)
        dtype = torch.float64 if double else torch.float32
        shapes = [torch.Size((*rows, *numbers_of(p).shape)) for p in layout]
        sizes = [shape.numel() for shape in shapes]
        flat = layout[0].new_zeros(sum(sizes), dtype=dtype)
        pieces = map(Tensor.view, flat.split(sizes), shapes)
        views = dict(zip(layout, pieces, strict=True))
        for p in parts.keys() & views.keys():
            views[p].copy_(numbers_of(parts[p]))
        dist.all_reduce(flat, group=self.group)
        for p in (p for p in layout if p.is_complex()):
            views[p] = torch.view_as_complex(views[p].clone())  # a pair starts at an even place
        return views

    def objects(self, mine: Any) -> list[Any]:
        """What every rank has to say; for what is rare, since it is pickled."""
        found: list[Any] = [None] * self.number
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def _compare_options(self) -> None:
        """The ranks would go apart, or wait for each other, if they were told different things."""
        everybody = self.objects(self._to_compare) if self._to_compare else []
        for name in self._to_compare:
            values = [options.get(name) for options in everybody]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{name} differs between the processes: {values}, by rank; expected the same "
                    "in all of them"
                )
        self._to_compare = {}

    def _gathered(self, message: Tensor) -> Tensor:
        """(number, *message.shape)."""
        received = message.new_empty(self.number, *message.shape)
        if not message.numel():  # the same on every rank, and gloo sends nothing
            return received
        _all_gather(received.view(-1), message.reshape(-1), group=self.group)
        return received
