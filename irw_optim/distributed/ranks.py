"""The processes that train one model, what they tell each other, and the rows of all of them.

Under FSDP no more than one group of layers l is ever whole: s = sum over groups of G_l (G_l^T c).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.layers import ConvolutionCall, EmbeddingCall, LayerCall, LinearCall
from irw_optim.gradients.protocol import (
    MEMORY_BOUND,
    Direction,
    PerSampleGradients,
    StackedGradients,
    added,
    numbers_of,
    widened,
)

# Renamed in torch 2.13, which warns of the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """The processes of a group. Every method is a collective: all of them must call it.

    ``options`` have to be equal on all ranks, and are compared once.
    """

    def __init__(self, group: Any, options: Mapping[str, Any]) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.number = dist.get_world_size(group)
        self.sizes = [0] * self.number  # of the batch at hand, since the last `gather_rows`
        self._capacity = 0
        self._to_compare = options

    @property
    def own(self) -> slice:
        """Which samples of the batch of all ranks are this one's."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather_rows(
        self, header: Sequence[float], rows: Tensor
    ) -> tuple[list[list[float]], Tensor]:
        """One header a rank, equally long on all, and the rows (n, c) of all, float64.

        A message has room for the most that any rank ever had, and is repeated with more.
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
        return [front[1:] for front in fronts], self._joined(bodies)

    def gather(self, values: Tensor) -> Tensor:
        """The values of every sample of the batch, of this rank's (n, ...)."""
        most = max(self.sizes)
        room = values.new_zeros(most, *values.shape[1:])
        room[: len(values)] = values
        return self._joined(self._gathered(room))

    def _joined(self, bodies: Tensor) -> Tensor:
        return torch.cat([body[:n] for body, n in zip(bodies, self.sizes, strict=True)])

    def each(self, numbers: Tensor) -> Tensor:
        """(ranks, *numbers.shape): the numbers of every rank, equally many on each."""
        self._compare_options()
        return self._gathered(numbers)

    def total(
        self, parts: Mapping[Tensor, Tensor], layout: Sequence[Tensor], rows: tuple[int, ...] = ()
    ) -> dict[Tensor, Tensor]:
        """The sum over ranks of vectors with one part a parameter, 0 if missing; at least float32.

        Parts may have ``rows``, dimensions in front of the parameter's.
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
        found: list[Any] = [None] * self.number
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def _compare_options(self) -> None:
        everybody = self.objects(self._to_compare) if self._to_compare else []
        for name in self._to_compare:
            values = [options.get(name) for options in everybody]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{name} differs between the processes: {values}, by rank; expected one value"
                )
        self._to_compare = {}

    def _gathered(self, message: Tensor) -> Tensor:
        received = message.new_empty(self.number, *message.shape)
        if not message.numel():  # the same on every rank, and gloo sends nothing
            return received
        _all_gather(received.view(-1), message.reshape(-1), group=self.group)
        return received


class GlobalGradients:
    """G = [G_0; G_1; ...], of all ranks; ``layout`` are the columns."""

    def __init__(self, rows: PerSampleGradients, ranks: Ranks, layout: Sequence[Tensor]) -> None:
        self.rows = rows
        self.ranks = ranks
        self.layout = layout
        self.batch_size = sum(ranks.sizes)

    def combine(self, weights: Tensor) -> dict[Tensor, Tensor]:
        return self.ranks.total(self.rows.combine(weights[self.ranks.own]), self.layout)

    def dot(self, direction: Direction) -> Tensor:
        return self.ranks.gather(self.rows.dot(direction))

    def gram(self) -> Tensor:
        return gram_over(self.rows, self.ranks, self.layout)


class LayerwiseGradients(GlobalGradients):
    """With the columns in groups, of which FSDP has one at a time; without `combine` and `dot`."""

    rows: GhostGradients

    def __init__(
        self, rows: GhostGradients, ranks: Ranks, groups: Sequence[Sequence[Tensor]]
    ) -> None:
        super().__init__(rows, ranks, [p for group in groups for p in group])
        self.groups = groups

    def align(self, coefficients: Tensor, factor: float = 1.0) -> Tensor:
        """G (G^T c), (B,), or with a factor that of ``factor`` times G: see `RescaledGradients`."""
        own = coefficients[self.ranks.own]
        # Of the columns, since a rank without samples has no rows to go by, and gathers too.
        double = any(p.dtype == torch.float64 for p in self.layout)
        scores = own.new_zeros(len(own), dtype=torch.float64 if double else torch.float32)
        for group in self.groups:
            part = self.rows.restricted_to(set(group))
            direction = self.ranks.total(part.combine(own), group)
            if factor != 1.0:
                direction = {p: widened(t) * factor for p, t in direction.items()}
            if part.calls:
                scores += part.dot(direction) * factor
        return self.ranks.gather(scores)

    align_rescaled = align

    def gram(self) -> Tensor:
        rows, ranks = self.rows, self.ranks
        return added(gram_over(rows.restricted_to(set(g)), ranks, g) for g in self.groups)

    def combine(self, weights: object) -> NoReturn:
        raise NotImplementedError(
            "a rule of one's own asked for a sum of gradients, as large as the sharded model: "
            "expected weighting='irw', 'cvar' or 'uniform'"
        )

    dot = combine  # type: ignore[assignment]


def gram_over(rows: PerSampleGradients, ranks: Ranks, layout: Sequence[Tensor]) -> Tensor:
    """G G^T over all ranks, (B, B): what an outlier filter looks at, on every rank.

    Layers whose per-sample gradient is a product of input and output gradient send these factors;
    all else (norms, tied weights, factors of another shape on another rank) its rows.
    """
    parts = rows.parts if isinstance(rows, StackedGradients) else [rows]
    ghosts = [part for part in parts if isinstance(part, GhostGradients)]
    calls = [(call, ghost) for ghost in ghosts for call in _sent_by_factors(ghost)]
    number = {p: i for i, p in enumerate(layout)}
    mine = [_outline(call, number) for call, _ in calls]
    if any(other != mine for other in ranks.objects(mine)):
        calls = []
    gram = torch.zeros((), device=layout[0].device)
    done: set[Tensor] = set()
    for call, ghost in calls:
        joined = call.copy()  # as if it had had the samples of all ranks
        joined.layout = None  # the batch is first already
        joined.input = ranks.gather(call.input)
        joined.set_output_gradient(ranks.gather(call.b / ghost.seed))
        gram = gram + joined.gram()
        done.update(call.parameters.values())
    left = [p for p in layout if p not in done]
    if left:
        parts = [p.restricted_to(set(left)) if isinstance(p, GhostGradients) else p for p in parts]
        gram = gram + _by_rows([p for p in parts if getattr(p, "calls", True)], ranks, left)
    return gram


def _sent_by_factors(ghost: GhostGradients) -> list[LayerCall]:
    """Those whose batch stands first, and that share no parameter."""
    uses = Counter(p for call in ghost.calls for p in call.parameters.values())
    return [
        call
        for call in ghost.calls
        if isinstance(call, LinearCall | ConvolutionCall | EmbeddingCall)
        and len(call.input) == len(call.b) == ghost.batch_size
        and all(uses[p] == 1 for p in call.parameters.values())
    ]


def _outline(call: LayerCall, number: dict[Tensor, int]) -> object:
    factors = [(str(t.dtype), *t.shape[1:]) for t in (call.input, call.b)]
    roles = {role: number[p] for role, p in call.parameters.items()}
    return type(call).__name__, roles, factors


def _by_rows(
    parts: Sequence[PerSampleGradients], ranks: Ranks, columns: Sequence[Tensor]
) -> Tensor:
    """K_ij for this rank's i and everybody's j, a block of j at a time."""
    size, own = sum(ranks.sizes), ranks.own
    like = numbers_of(widened(columns[0].new_empty(0)))
    step = max(1, MEMORY_BOUND // max(1, sum(p.numel() for p in columns)))
    gram = like.new_zeros(own.stop - own.start, size)
    for start in range(0, size, step):
        block = range(start, min(start + step, size))
        sent: dict[Tensor, Tensor] = {}
        for place, sample in enumerate(block):
            if own.start <= sample < own.stop:
                one = like.new_zeros(len(gram))
                one[sample - own.start] = 1
                for p, row in (item for part in parts for item in part.combine(one).items()):
                    sent.setdefault(p, row.new_zeros(len(block), *row.shape))[place] = row
        received = ranks.total(sent, columns, (len(block),))
        for place, sample in enumerate(block):
            direction = {p: rows[place] for p, rows in received.items()}
            for part in parts:
                gram[:, sample] += part.dot(direction)
    return ranks.gather(gram)
