"""What rules are given and give; and J t of any operation without one.

u -> J^T u is what a node does, so its derivative by u, along t, is J t. Fused attention and LSTMs
have none, but rules here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from irw_optim.gradients.layers import LSTM
from irw_optim.gradients.mixing_rules import ATTENTION
from irw_optim.gradients.nodes import COPY, base_name, pull, saved
from irw_optim.gradients.recurrence import RECURRENT, linearized, steps_of

Tangents: TypeAlias = Sequence[Tensor | None]
"""A change for each input of a node (``node.next_functions``); None for none."""

Changes: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""The change of the first output, or of each; None for "not by this rule"."""

ForwardRule: TypeAlias = Callable[[Any, Tangents], Changes]


def of_one(rule: Callable[[Any, Tensor], Changes]) -> ForwardRule:
    """For operations that read one tensor, whose change the rule is given."""

    def of_node(node: Any, tangents: Tangents) -> Changes:
        (change,) = [t for t in tangents if t is not None]
        return rule(node, change)

    return of_node


def again(operation: Callable[..., Changes], *settings: str) -> ForwardRule:
    """What was done to the input, with these settings, is done to the change."""
    return of_one(lambda node, t: operation(t, *[saved(node, name) for name in settings]))


def added(*terms: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def transposed(node: Any, tangents: Tangents) -> Tangents:
    """The changes of a node's outputs; RuntimeError without double backward, or a hidden one."""
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    with torch.enable_grad():
        seeds = [_seed(node, metadata).requires_grad_() for metadata in node._input_metadata]
        pulled = pull(node, seeds)
        if base_name(node) == COPY and len(tangents) == 2:
            copied = _copied(*seeds, *pulled, *tangents)
            if copied is not None:
                return [copied]
        gradients, directions = [], []
        for number, tangent in changing:
            gradient = pulled[number]
            if gradient is not None and gradient.requires_grad:
                gradients.append(gradient)
                directions.append(tangent.to(gradient.dtype).expand(gradient.shape))
            elif gradient is not None and gradient.any():
                raise RuntimeError(_SAYS_NOT)
        if not gradients:
            return [None for _ in seeds]
        found = torch.autograd.grad(gradients, seeds, directions, allow_unused=True)
    pushed = [(c, u) for c, u in zip(found, seeds, strict=True) if c is not None]
    if _may_hide(node) and not _add_up(pushed, list(zip(directions, gradients, strict=True))):
        raise RuntimeError(_SAYS_NOT)
    return [None if change is None else change.detach() for change in found]


def _copied(seed: Tensor, kept: Any, taken: Any, base: Any, put: Any) -> Tensor | None:
    """Into a view, if unlike numbers that go back show this alone, and where."""
    if base is None or kept is None or not seed.is_cpu:  # to look would be to wait
        return None
    if seed.numel() * torch.finfo(seed.dtype).eps > 0.1:  # some are alike
        return None
    gone = kept == 0
    if put is None:
        return base.masked_fill(gone, 0.0) if kept.where(~gone, seed).equal(seed) else None
    if taken is None or taken.dtype != seed.dtype or taken.numel() != gone.sum():
        return None
    return base.masked_scatter(gone, put) if kept.masked_scatter(gone, taken).equal(seed) else None


_SAYS_NOT = "its gradient does not depend as it should on what it is given"


def _may_hide(node: Node) -> bool:
    """Functions in Python may detach what they are given; copies into views may call such."""
    return base_name(node) in ("", COPY)


def _seed(node: Node, metadata: Any) -> Tensor:
    shape: Sequence[int] = metadata.shape
    options: Any = {"dtype": metadata.dtype, "device": metadata.device}
    if _may_hide(node):  # no two alike: what is linear is seen to be
        return _different(prod(shape), **options).view(shape)
    if base_name(node) == "Logcumsumexp":  # its backward takes a logarithm
        return torch.ones(shape, **options)
    return torch.zeros(shape, **options)


def _different(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers from 0.5 to 1.5, each larger than the one before."""
    wide = torch.promote_types(dtype, torch.float32).to_real()
    steps = torch.arange(count, dtype=wide, device=device)
    numbers = (steps * 0.6180339887498949).frac_().div_(2).add_(steps)
    return numbers.div_(count).add_(0.5).to(dtype)


_Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def _add_up(pushed: _Pairs, pulled: _Pairs) -> bool:
    """Whether <J t, u> = <t, J^T u>."""
    (left, _), (right, size) = _inner(pushed), _inner(pulled)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(pulled[0][0].dtype, 1e-1)
    return bool(torch.as_tensor(left - right).abs() <= tolerance * size)


def _inner(pairs: _Pairs) -> tuple[Tensor | float, Tensor | float]:
    """A sum of products, and that of their sizes."""
    terms = [(a.detach().conj() * b.detach()).real for a, b in pairs]
    return sum(t.sum() for t in terms), sum(t.abs().sum() for t in terms)


def _attention(node: Any, tangents: Tangents) -> Tensor | None:
    """Of softmax(scale q k^T + mask) v, some samples at a time."""
    if node._saved_dropout_p or any(t is not None for t in tangents[3:]):
        return None  # the mask of a fused dropout is nowhere
    for name in _NOT_NEEDED:
        getattr(node, name, None)
    query, key, value = node._saved_query, node._saved_key, node._saved_value
    masks = [getattr(node, name, None) for name in ("_saved_attn_mask", "_saved_attn_bias")]
    scale = query.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale
    mask = next((m for m in masks if m is not None), None)
    attended = partial(_attended, scale=scale, causal=node._saved_is_causal)
    inputs = query, key, value, mask, *tangents[:3]
    number = query[..., 0].numel() * key.shape[-2]
    size = max(1, _AT_ONCE.get(query.device.type, 2**22) * len(query) // number)
    if size >= len(query):
        return attended(*inputs)
    parts = (slice(start, start + size) for start in range(0, len(query), size))
    return torch.cat([attended(*(_part(t, part, query) for t in inputs)) for part in parts])


_NOT_NEEDED = ("_saved_output", "_saved_logsumexp", "_saved_out", "_saved_log_sumexp")
"""What was recomputed is held until it is read."""

_AT_ONCE = {"cpu": 2**16}
"""Attention weights that are made at a time, to spare memory."""


def _part(tensor: Any, samples: slice, query: Tensor) -> Any:
    one_for_all = tensor is None or tensor.ndim < query.ndim or len(tensor) == 1
    return tensor if one_for_all else tensor[samples]


def _attended(*inputs: Any, scale: float, causal: bool) -> Tensor:
    query, key, value, mask, d_query, d_key, d_value = inputs
    repeats = query.shape[-3] // key.shape[-3] if query.ndim > 3 else 1
    if repeats > 1:  # grouped queries
        of_groups = key, value, d_key, d_value
        key, value, d_key, d_value = (
            None if t is None else t.repeat_interleave(repeats, -3) for t in of_groups
        )
    query, d_query = query * scale, None if d_query is None else d_query * scale
    scores = query @ key.mT
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.where(allowed, -torch.inf)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores + mask if mask.is_floating_point() else scores.where(mask, -torch.inf)
        sees_nothing = scores.amax(-1, keepdim=True) == -torch.inf
        weights = scores.softmax(-1).masked_fill_(sees_nothing, 0.0)
    of_scores = added(
        None if d_query is None else d_query @ key.mT,
        None if d_key is None else query @ d_key.mT,
    )
    back = torch.ops.aten._softmax_backward_data.default  # J = J^T
    change = added(
        None if of_scores is None else back(of_scores, weights, -1, weights.dtype) @ value,
        None if d_value is None else weights @ d_value,
    )
    assert change is not None
    return change


def _lstm(node: Any, tangents: Tangents) -> list[Tensor | None] | None:
    if node._saved_mode != LSTM or node._saved_batch_sizes:
        return None
    d_input, *d_values, d_state, d_cell = tangents
    names = RECURRENT if node._saved_has_biases else RECURRENT[:2]
    values = {name: getattr(node, f"_saved_weight{n}") for n, name in enumerate(names)}
    states = node._saved_result0
    length, batch, _ = states.shape
    steps = steps_of((batch,) * length, node._saved_reverse)
    inputs = node._saved_input.flatten(0, 1)
    first = node._saved_hx_, node._saved_cx_
    recurrence = linearized("LSTM", inputs, states.flatten(0, 1), steps, *first, values)
    change = None if d_input is None else d_input.flatten(0, 1)
    changes = dict(zip(RECURRENT, d_values, strict=True))
    found, cells = recurrence.forward(inputs, values, change, steps, d_state, d_cell, changes)
    return [found.view(states.shape), found[steps.last], cells[steps.last]]


def _cell(node: Any, tangents: Tangents) -> list[Tensor | None]:
    """A unit depends on its own gates and what it carried: what ones pull back is J's diagonal."""
    *of_gates, carried = tangents[:3]
    sides = [added(*pair) for pair in zip(of_gates, tangents[3:], strict=True)]
    aten, pulled = torch.ops.aten, list[Any]()
    if base_name(node) == "ThnnFusedGruCell":  # its gates read inputs and states apart
        seed = torch.ones_like(node._saved_hx)
        pulled = [aten._thnn_fused_gru_cell_backward(seed, node._saved_result1, False)[:3]]
    else:
        sides, kept = [added(*sides)], (node._saved_cx, node._saved_result1, node._saved_result2)
        seed, back = torch.ones_like(kept[0]), aten._thnn_fused_lstm_cell_backward_impl
        pulled = [back(*u, *kept, False)[:2] for u in ((seed, None), (None, seed))]
    found: list[Tensor | None] = []
    for *slopes, slope in pulled:
        each = [s * side for s, side in zip(slopes, sides, strict=True) if side is not None]
        total = added(*(t.view(len(t), -1, slope.shape[1]).sum(1) for t in each))
        if carried is not None:
            total = carried * slope if total is None else total.addcmul_(carried, slope)
        found.append(total)
    return found


RULES: dict[str, ForwardRule] = {
    ATTENTION: _attention,
    "MkldnnRnnLayer": _lstm,
    "ThnnFusedLstmCell ThnnFusedGruCell": _cell,
}
