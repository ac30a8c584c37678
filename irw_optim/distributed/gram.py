"""G G^T over all ranks, (B, B): what an outlier filter looks at.

Layers whose per-sample gradient is a product of their input and their output gradient send these
factors, a layer at a time: B (in + out) numbers, and for sequences T times that. Everything else
(norms, tied weights, what only autodiff covers, factors of another shape on another rank) sends
its rows, of which no more than a block exists at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from irw_optim.distributed.ranks import Ranks
from irw_optim.gradients.ghost import GhostGradients
from irw_optim.gradients.layers import LayerCall, LinearCall
from irw_optim.gradients.layers._convolution import ConvolutionCall
from irw_optim.gradients.layers._embedding import EmbeddingCall
from irw_optim.gradients.materialized import MEMORY_BOUND, numbers_of, widened
from irw_optim.gradients.protocol import PerSampleGradients, StackedGradients

_BY_FACTORS = (LinearCall, ConvolutionCall, EmbeddingCall)


def gram_over(rows: PerSampleGradients, ranks: Ranks, layout: Sequence[Tensor]) -> Tensor:
    """G G^T of the rows of all ranks, on every rank: a collective.

    Args:
        rows: this rank's.
        ranks: all of them.
        layout: the columns, as parameters in an order that all ranks have.
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
        gram = gram + _joined(call, ghost, ranks).gram()
        done.update(call.parameters.values())
    left = [p for p in layout if p not in done]
    if left:
        gram = gram + _by_rows(_restricted(parts, set(left)), ranks, left)
    return gram


def _sent_by_factors(ghost: GhostGradients) -> list[LayerCall]:
    """The calls whose batch stands first in all they keep, and that share no parameter."""
    uses = Counter(p for call in ghost.calls for p in call.parameters.values())
    return [
        call
        for call in ghost.calls
        if isinstance(call, _BY_FACTORS)
        and len(call.input) == len(call.b) == ghost.batch_size
        and all(uses[p] == 1 for p in call.parameters.values())
    ]


def _outline(call: LayerCall, number: dict[Tensor, int]) -> object:
    """What must be equal on all ranks, for their factors to make one call."""
    factors = [(str(t.dtype), *t.shape[1:]) for t in (call.input, call.b)]
    roles = {role: number[p] for role, p in call.parameters.items()}
    return type(call).__name__, roles, factors


def _joined(call: LayerCall, ghost: GhostGradients, ranks: Ranks) -> LayerCall:
    """The call as if it had had the samples of all ranks."""
    joined = call.copy()
    joined.layout = None  # the batch is first already
    joined.input = ranks.gather(call.input)
    joined.set_output_gradient(ranks.gather(call.b / ghost.seed))
    return joined


def _restricted(
    parts: Sequence[PerSampleGradients], parameters: set[Tensor]
) -> list[PerSampleGradients]:
    chosen = [
        part.restricted_to(parameters) if isinstance(part, GhostGradients) else part
        for part in parts
    ]
    return [part for part in chosen if not isinstance(part, GhostGradients) or part.calls]


def _by_rows(
    parts: Sequence[PerSampleGradients], ranks: Ranks, columns: Sequence[Tensor]
) -> Tensor:
    """K_ij = <g_i, g_j> for this rank's i and everybody's j, a block of j at a time."""
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
