"""Whose each row is, where an index moves rows: nodes and edges of graphs, tokens of experts.

A batch of graphs is one graph of many parts, and no stride tells whose a node is. Behind an index
each row is followed as a sample of its own; the sample that has a sum owns what was added to it.
Indices change from step to step, so that is found anew in each.
"""

from collections.abc import Hashable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .graph import Graph
from .layers import Layout
from .nodes import SHARED, UNREAD, MixesError, Output, Rule, base_name, mixes, shape_of, signed

NOBODYS = -1
"""The owner of rows that nothing reads."""

IN_TURNS = -1
"""The number of owners that have one row each in turns."""

_TAKE_ROWS = "Gather", "Index", "IndexSelect", "Slice"
_PUT_ROWS = (
    "IndexAdd",
    "IndexCopy",
    "IndexPut",
    "IndexReduce",
    "Scatter",
    "ScatterAdd",
    "ScatterReduce",
)


class _Move(NamedTuple):
    """An index through which rows were followed."""

    place: int  # of its node in the graph's order
    puts: bool  # rather than takes
    owners: int  # those of the output, by number
    dim: int
    size: int  # of the output there,
    inner: int  # of which so many adjacent ones are one row
    rows: int  # that are read


class _Meeting(NamedTuple):
    """A tensor that was reached in two ways."""

    rows: int
    stride: int  # of a row
    reached: tuple[tuple[int, int], ...]  # stride and number of the owners


class _Addressed(NamedTuple):
    """Where an index is in the tensor that it takes rows from, or puts them into."""

    puts: bool
    dim: int
    width: int  # dimensions from there on that are rows together,
    gone: int  # and that one dimension stands for on the other side


class PaddedLayout(Layout):
    """Rows in any order, padded with zeros to as many for each sample."""

    rows: Layout
    owners: int  # by number
    slots: Tensor  # of each row, (rows,)
    most: int  # rows of a sample

    def bring(self, tensor: Tensor, batch_size: int) -> Tensor:
        rows = self.rows.bring(tensor, len(self.slots))
        padded = rows[:1].expand(batch_size * self.most, *rows.shape[1:])
        if any(rows.stride()):  # not one number for all
            padded = torch.zeros_like(padded).index_copy_(0, self.slots, rows)
        padded = padded.view(batch_size, self.most, *rows.shape[1:]).movedim(1, self.dim + 1)
        return padded.flatten(self.dim + 1, self.dim + 2) if self.rows.fold else padded


class Rows:
    """To whom rows belong, by number: 0 is the samples themselves, or as many rows for each."""

    def __init__(self, graph: Graph, batch_size: int, device: torch.device) -> None:
        self.graph = graph
        self.owners = [torch.arange(batch_size, device=device)]
        self.ways: list[tuple[_Move | _Meeting, int]] = []
        self._known: dict[Hashable, tuple[int, Tensor]] = {}
        self._spreads: dict[tuple[int, int, int], Tensor] = {}
        self._slots: dict[int, tuple[Tensor, int]] = {}

    def read_by(
        self, rule: Rule, place: int, output: Output, owners: int
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Strides in what a node reads, and the owners of the rows there."""
        try:
            return rule(output), [owners] * len(output.inputs)
        except MixesError:
            if not self.owners[0].is_cpu:  # where to look at an index waits
                raise
            puts, dim, width, gone = _addressed(output)
        moved, stays = output.inputs[puts], [output.stride] * puts  # what is put into is read, too
        if not moved or 0 in moved:
            return [*stays, UNREAD], [owners, owners]
        wider = len(output.shape) - len(moved) if puts else len(moved) - len(output.shape)
        made, read = (width, 1) if puts else (1, width)
        inner, left = divmod(output.stride, prod(output.shape[dim + made :]))
        rows = prod(moved[dim : dim + read])
        if wider != gone - 1 or left or not inner or rows == 1:
            mixes()
        size = prod(output.shape[dim : dim + made])
        number = self._note(_Move(place, puts, owners, dim, size, inner, rows))
        stride = self._rows_each(number, rows) * prod(moved[dim + read :])
        return [*stays, stride], [*[owners] * puts, max(0, number)]

    def meet(self, one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
        """Stride and owners where a tensor was reached by two ways."""
        by_row = [way for way in (one, other) if way[1]]
        if not by_row or SHARED in (one[0], other[0]):
            mixes()
        stride, rows = by_row[0][0], len(self.owners[by_row[0][1]])
        if any(s != stride or len(self.owners[n]) != rows for s, n in by_row):
            mixes()
        number = self._note(_Meeting(rows, stride, (one, other)))
        return stride * self._rows_each(number, rows), max(0, number)

    def padded(self, rows: Layout, owners: int) -> PaddedLayout:
        """Of calls that have such rows in this layout."""
        if owners not in self._slots:
            self._slots[owners] = _slots(self.owners[owners], len(self.owners[0]))
        layout = PaddedLayout(rows.dim, f"padded {rows.fold}")
        layout.rows, layout.owners = rows, owners
        layout.slots, layout.most = self._slots[owners]
        return layout

    def number_of(self, way: _Move | _Meeting) -> int:
        """Of the owners; samples that meet raise `MixesError`."""
        if isinstance(way, _Meeting):
            vectors = [self._of_rows(way, *one) for one in way.reached]
            return self._number(_agreed(*vectors))
        index = _index_of(self.graph.order[way.place], way.dim)
        key = index.data_ptr(), index.shape, index.stride(), way[1:]
        if key not in self._known:  # with the index, so that nothing else takes its place
            self._known[key] = self._behind(way, index), index
        return self._known[key][0]

    def _note(self, way: _Move | _Meeting) -> int:
        number = self.number_of(way)
        self.ways.append((way, number))
        return number

    def _behind(self, way: _Move, index: Tensor) -> int:
        ahead = self._spread(way.owners, way.inner, way.size)
        owners = ahead[index] if way.puts else None
        for number, known in self._of_as_many(way.rows):
            mine, theirs = (known, owners) if owners is not None else (known[index], ahead)
            if torch.equal(mine, theirs):
                return number
        if owners is None:
            index = index % way.rows  # some count from the end
            nobodys = torch.full((way.rows,), NOBODYS, device=index.device)
            owners = nobodys.scatter_reduce(0, index, ahead, "amax")
            _agreed(owners[index], ahead)
        return self._number(owners)

    def _of_as_many(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """The owners that so many rows may have, by number."""
        if rows % len(self.owners[0]) == 0:
            yield 0, self._spread(0, self._rows_each(0, rows), rows)
            yield IN_TURNS, self._spread(0, 1, rows)
        yield from [(n, o) for n, o in enumerate(self.owners) if n and len(o) == rows]

    def _spread(self, number: int, inner: int, size: int) -> Tensor:
        """The owners along a dimension of so many, where so many adjacent ones are one row."""
        key = number, inner, size
        if key not in self._spreads:
            rows = self.owners[number].repeat_interleave(inner)
            if size % len(rows):
                mixes()
            self._spreads[key] = rows if len(rows) == size else rows.repeat(size // len(rows))
        return self._spreads[key]

    def _of_rows(self, met: _Meeting, stride: int, number: int) -> Tensor:
        if number:
            return self.owners[number]
        return mixes() if stride % met.stride else self._spread(0, stride // met.stride, met.rows)

    def _number(self, owners: Tensor) -> int:
        for number, known in self._of_as_many(len(owners)):
            if bool(((owners == known) | (owners == NOBODYS)).all()):
                return number
        self.owners.append(owners)
        return len(self.owners) - 1

    def _rows_each(self, number: int, rows: int) -> int:
        return 1 if number else rows // len(self.owners[0])


def rows_along(
    ways: Sequence[tuple[_Move | _Meeting, int]], graph: Graph, losses: Tensor
) -> Rows | None:
    """In another graph of the kind; None where they go other ways, or meet."""
    rows = Rows(graph, len(losses), losses.device)
    try:
        same = all(rows.number_of(way) == number for way, number in ways)
    except (MixesError, IndexError, RuntimeError):
        return None
    return rows if same else None


def _addressed(output: Output) -> _Addressed:
    """By an index along the samples; `MixesError` for any other."""
    name, dim = base_name(output.node), output.dim
    puts = name in _PUT_ROWS
    if not puts and name not in _TAKE_ROWS:
        mixes()
    if not hasattr(output.node, "_saved_indices"):
        return _Addressed(puts, dim, 1, 1) if output.saved_dims() == [dim] else mixes()
    indices = output.node._saved_indices
    given = [n for n, index in enumerate(indices) if index is not None]
    first, index = given[0], indices[given[0]]
    if _is_mask(index) and len(given) == 1:
        inside = 0 <= dim - first < (index.ndim if puts else 1)
        return _Addressed(puts, first, index.ndim, index.ndim) if inside else mixes()
    adjacent = given == [*range(dim, dim + len(given))]
    vectors = adjacent and all(indices[n].ndim == 1 for n in given)
    return _Addressed(puts, dim, 1, len(given)) if vectors else mixes()


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _agreed(one: Tensor, other: Tensor) -> Tensor:
    """Of two ways to say whose rows are."""
    if bool(((one != other) & (one != NOBODYS) & (other != NOBODYS)).any()):
        mixes()
    return torch.maximum(one, other)


def _index_of(node: Any, dim: int) -> Tensor:
    """That along the rows; for each number of a row the same."""
    if hasattr(node, "_saved_indices"):
        index: Tensor = node._saved_indices[dim]
        return index.flatten().nonzero().squeeze(1) if _is_mask(index) else index.long()
    if hasattr(node, "_saved_start"):
        start, step = signed(node._saved_start or 0), node._saved_step
        return torch.arange(start, start + step * shape_of(node)[dim], step, device="cpu")
    index = node._saved_index.long()
    if index.ndim == 1:
        return index
    for other in reversed(range(index.ndim)):
        if other != dim:
            first = index.select(other, 0)
            if index.stride(other) and bool((index != first.unsqueeze(other)).any()):
                mixes()
            index = first
    return index


def _slots(owners: Tensor, samples: int) -> tuple[Tensor, int]:
    """Where each row stands, in rows padded to as many for each sample; and how many these are."""
    owners = torch.where(owners == NOBODYS, owners.cummax(0).values.clamp(min=0), owners)
    counts = owners.bincount(minlength=samples)
    most = int(counts.max())
    order = owners.argsort(stable=True)
    at = torch.arange(len(owners), device=owners.device)
    place = torch.empty_like(order).scatter_(0, order, at)
    return owners * most + place - (counts.cumsum(0) - counts)[owners], most
