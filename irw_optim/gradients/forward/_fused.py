"""Changes through operations that torch fuses, by the formulas of what they fuse.

Some of them have no derivative of their derivative: attention in one kernel, an LSTM over time.
What they compute is made of products, a softmax and a few functions, which are written out here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from irw_optim.gradients.forward._registry import Tangents, added, forward_rule
from irw_optim.gradients.layers import LSTM, RECURRENT, gates_of


@forward_rule(
    "ScaledDotProductFlashAttentionForCpu",
    "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention",
    "ScaledDotProductCudnnAttention",
    "ScaledDotProductFusedAttentionOverrideable",
)
def _attention(node: Any, tangents: Tangents) -> Tensor | None:
    """Of softmax(scale q k^T + mask) v, with the weights made anew."""
    if node._saved_dropout_p or any(t is not None for t in tangents[3:]):
        return None  # the mask of a fused dropout is nowhere
    d_query, d_key, d_value = tangents[:3]
    query, key, value = node._saved_query, node._saved_key, node._saved_value
    scale = node._saved_scale
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[-3] // key.shape[-3] if query.ndim > 3 else 1
    if repeats > 1:  # grouped queries
        key, value, d_key, d_value = (
            None if t is None else t.repeat_interleave(repeats, -3)
            for t in (key, value, d_key, d_value)
        )
    scores = query @ key.mT * scale
    for name in ("_saved_attn_mask", "_saved_attn_bias"):
        mask = getattr(node, name, None)
        if mask is not None:
            scores = scores + mask if mask.is_floating_point() else scores.where(mask, -torch.inf)
    if node._saved_is_causal:
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
        change = added(change, product @ value)
    return change


@forward_rule("MkldnnRnnLayer")
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
    of_gates = torch.cat([gates.of_states.flatten(2), gates.of_output], 2)
    recurrent, cells, found = values["weight_hh"].t(), 3 * states.shape[2], []
    for first, slope, forget, to_cell in zip(
        of_inputs.unbind(),
        of_gates.unbind(),
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
