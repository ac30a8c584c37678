"""Changes through operations that torch fuses, by the formulas of what they fuse.

Some of them have no derivative of their derivative: attention in one kernel, an LSTM over time.
What they compute is made of products, a softmax and a few functions, which are written out here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.forward._tangents import ForwardRule, Tangents, added
from irw_optim.gradients.layers import LSTM, RECURRENT, gates_of


def _attention(node: Any, tangents: Tangents) -> Tensor | None:
    """Of softmax(scale q k^T + mask) v, with the weights made anew, for a few samples at a time."""
    if node._saved_dropout_p or any(t is not None for t in tangents[3:]):
        return None  # the mask of a fused dropout is nowhere
    for name in _NOT_NEEDED:
        getattr(node, name, None)
    query, key, value = node._saved_query, node._saved_key, node._saved_value
    masks = [getattr(node, name, None) for name in ("_saved_attn_mask", "_saved_attn_bias")]
    scale = query.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale
    mask = next((m for m in masks if m is not None), None)
    attended = partial(_attended, scale=scale, causal=node._saved_is_causal)
    inputs: list[Any] = [query, key, value, mask, *tangents[:3]]
    number = query[..., 0].numel() * key.shape[-2]
    size = max(1, _AT_ONCE.get(query.device.type, 2**22) * len(query) // number)
    if size >= len(query):
        return attended(*inputs)
    parts = (slice(start, start + size) for start in range(0, len(query), size))
    return torch.cat([attended(*(_part(t, part, query) for t in inputs)) for part in parts])


_NOT_NEEDED = ("_saved_output", "_saved_logsumexp", "_saved_out", "_saved_log_sumexp")
"""What was recomputed is held until it is read."""

_AT_ONCE = {"cpu": 2**16}
"""Numbers of attention weights that are made at a time: kernels fuse them to spare the memory."""


def _part(tensor: Any, samples: slice, query: Tensor) -> Any:
    """Some samples of what may be one mask for all of them."""
    one_for_all = tensor is None or tensor.ndim < query.ndim or len(tensor) == 1
    return tensor if one_for_all else tensor[samples]


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_value: Tensor | None,
    *,
    scale: float,
    causal: bool,
) -> Tensor:
    repeats = query.shape[-3] // key.shape[-3] if query.ndim > 3 else 1
    if repeats > 1:  # grouped queries
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        d_key, d_value = (
            None if t is None else t.repeat_interleave(repeats, -3) for t in (d_key, d_value)
        )
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores + mask if mask.is_floating_point() else scores.where(mask, -torch.inf)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.where(allowed, -torch.inf)
    sees_nothing = scores.amax(-1, keepdim=True) == -torch.inf
    weights = scores.softmax(-1).masked_fill(sees_nothing, 0.0)
    change = None if d_value is None else weights @ d_value
    change_of_scores = added(
        None if d_query is None else d_query @ key.mT,
        None if d_key is None else query @ d_key.mT,
    )
    if change_of_scores is not None:
        product = weights * change_of_scores * scale
        product = product - weights * product.sum(-1, keepdim=True)
        change = product @ value if change is None else change + product @ value
    assert change is not None, "a change of one of the three at least"
    return change


def _lstm(node: Any, tangents: Tangents) -> list[Tensor | None] | None:
    """Step by step, with the values that the steps had."""
    if node._saved_mode != LSTM or node._saved_batch_sizes:
        return None
    d_input, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_state, d_cell = tangents
    names = RECURRENT if node._saved_has_biases else RECURRENT[:2]
    values = {name: getattr(node, f"_saved_weight{n}") for n, name in enumerate(names)}
    inputs, states, state, cell = (
        node._saved_input,
        node._saved_result0,
        node._saved_hx_,
        node._saved_cx_,
    )
    reverse = node._saved_reverse
    if reverse:
        inputs, states = inputs.flip(0), states.flip(0)
        d_input = None if d_input is None else d_input.flip(0)
    before = torch.cat([state.unsqueeze(0), states[:-1]])
    gates = gates_of(inputs, before, cell, values)
    change = added(
        None if d_input is None else d_input @ values["weight_ih"].t(),
        None if d_weight_ih is None else inputs @ d_weight_ih.t(),
        None if d_weight_hh is None else before @ d_weight_hh.t(),
        added(d_bias_ih, d_bias_hh),
    )
    shape = (*states.shape[:2], 4 * states.shape[2])
    of_inputs = states.new_zeros(shape) if change is None else change.expand(shape)
    d_state = torch.zeros_like(state) if d_state is None else d_state
    d_cell = torch.zeros_like(cell) if d_cell is None else d_cell
    recurrent, cells, found = values["weight_hh"].t(), 3 * states.shape[2], []
    for first, slope, forget, to_cell in zip(
        of_inputs.unbind(),
        gates.slopes.flatten(2).unbind(),
        gates.forget.unbind(),
        gates.to_cell.unbind(),
        strict=True,
    ):
        steps = torch.addmm(first, d_state, recurrent).mul_(slope)
        into_cell = steps[:, :cells].unflatten(1, (3, -1)).sum(1)
        d_cell = torch.addcmul(into_cell, forget, d_cell)
        d_state = torch.addcmul(steps[:, cells:], to_cell, d_cell)
        found.append(d_state)
    over_time = torch.stack(found)
    return [over_time.flip(0) if reverse else over_time, d_state, d_cell]


_ATTENTION = (
    "ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention "
    "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention "
    "ScaledDotProductFusedAttentionOverrideable"
)

RULES: dict[str, ForwardRule] = {_ATTENTION: _attention, "MkldnnRnnLayer": _lstm}
