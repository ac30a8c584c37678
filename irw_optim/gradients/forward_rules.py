"""How a change of an operation's inputs changes its output: for each a line, from what it saved.

A rule gets the node and a change for each input (None for none), and gives that of the output;
None stands for "not by this rule": then the node's own derivative is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from irw_optim.gradients.nodes import pull, read_by, shape_of, signed

Tangents: TypeAlias = Sequence[Tensor | None]
ForwardRule: TypeAlias = Callable[[Any, Tangents], "Tensor | list[Tensor | None] | None"]

FORWARD: dict[str, ForwardRule] = {}


def forward_rule(*names: str) -> Callable[[ForwardRule], ForwardRule]:
    """Register a rule for operations, by the names of their nodes."""

    def register(rule: ForwardRule) -> ForwardRule:
        FORWARD.update(dict.fromkeys(names, rule))
        return rule

    return register


def added(*terms: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


# Elementwise, and other symmetric derivatives -----------------------------------------------------


def diagonal(node: Any, tangents: Tangents) -> Tensor | None:
    """Every number of the output depends on one of each input: the node's pull is its push."""
    changing = [number for number, t in enumerate(tangents) if t is not None]
    if len(changing) > 1:  # what is recomputed (checkpointing) is handed out once
        return None
    (number,), shape = changing, shape_of(node)
    others = [None] * (len(node._input_metadata) - 1)
    tangent = tangents[number].to(node._input_metadata[0].dtype)
    change = pull(node, [tangent.expand(shape), *others])[number]
    return change if change is not None and change.shape == shape else None


def of_single_losses(node: Any, tangents: Tangents) -> Tensor | None:
    """Elementwise, unless the losses are averaged."""
    return None if node._saved_reduction else diagonal(node, tangents)


@forward_rule("Softmax", "SafeSoftmax")
def _softmax(node: Any, tangents: Tangents) -> Tensor | None:
    return pull(node, tangents)[0]


@forward_rule("LogSoftmax")
def _log_softmax(node: Any, tangents: Tangents) -> Tensor:
    (t,) = tangents
    dim = signed(node._saved_dim)
    return t - (node._saved_result.exp() * t).sum(dim, keepdim=True)


@forward_rule("Add", "Sub")
def _sum(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    sign = -1 if node.name().startswith("Sub") else 1
    alpha = sign * getattr(node, "_saved_alpha", 1)
    if right is None or left is None:
        only = left if right is None else right if alpha == 1 else right * alpha
        return None if only is None else only.expand(shape_of(node))
    return torch.add(left, right, alpha=alpha).expand(shape_of(node))


@forward_rule("Mul")
def _product(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    if left is None:
        return (right * node._saved_self).expand(shape_of(node))
    first = left * node._saved_other
    if right is None:
        return first.expand(shape_of(node))
    return torch.addcmul(first, right, node._saved_self).expand(shape_of(node))


@forward_rule("Div")
def _quotient(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents if len(tangents) == 2 else (tangents[0], None)
    if right is None or getattr(node, "_saved_rounding_mode", None) is not None:
        return diagonal(node, tangents)
    top, bottom = node._saved_self, node._saved_other
    change = -right * top / bottom.square()
    return added(change, None if left is None else left / bottom).expand(shape_of(node))


@forward_rule("Where")
def _where(node: Any, tangents: Tangents) -> Tensor:
    left, right = tangents
    condition = node._saved_condition
    like = left if left is not None else right
    zero = like.new_zeros(())
    chosen = torch.where(
        condition, zero if left is None else left, zero if right is None else right
    )
    return chosen.expand(shape_of(node))


@forward_rule("NllLoss", "NllLoss2D")
def _negative_likelihood(node: Any, tangents: Tangents) -> Tensor | None:
    (t,) = tangents
    target, weight = node._saved_target, node._saved_weight
    if node._saved_reduction or t.ndim < 2:
        return None
    ignored = target == signed(node._saved_ignore_index)
    labels = target.masked_fill(ignored, 0)
    picked = t.gather(1, labels.unsqueeze(1)).squeeze(1)
    factor = -1.0 if weight is None else -weight[labels]
    return (picked * factor).masked_fill(ignored, 0.0)


# Products -----------------------------------------------------------------------------------------


@forward_rule("Mm")
def _matrix_product(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents
    return added(
        None if left is None else left.mm(node._saved_mat2),
        None if right is None else node._saved_self.mm(right),
    )


@forward_rule("Addmm")
def _linear(node: Any, tangents: Tangents) -> Tensor | None:
    summand, left, right = tangents
    alpha, beta = node._saved_alpha, node._saved_beta
    product = added(
        None if left is None else left.mm(node._saved_mat2),
        None if right is None else node._saved_mat1.mm(right),
    )
    if product is None:
        return (summand * beta).expand(shape_of(node))
    product = product if alpha == 1 else product * alpha
    return product if summand is None else torch.add(product, summand, alpha=beta)


@forward_rule("Bmm")
def _batched_product(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents
    return added(
        None if left is None else left.bmm(node._saved_mat2),
        None if right is None else node._saved_self.bmm(right),
    )


@forward_rule("Baddbmm")
def _batched_linear(node: Any, tangents: Tangents) -> Tensor | None:
    summand, left, right = tangents
    alpha, beta = node._saved_alpha, node._saved_beta
    product = added(
        None if left is None else left.bmm(node._saved_batch2),
        None if right is None else node._saved_batch1.bmm(right),
    )
    if product is None:
        return (summand * beta).expand(shape_of(node))
    product = product if alpha == 1 else product * alpha
    return product if summand is None else torch.add(product, summand, alpha=beta)


@forward_rule("Mv")
def _matrix_by_vector(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = tangents
    return added(
        None if left is None else left.mv(node._saved_vec),
        None if right is None else node._saved_self.mv(right),
    )


@forward_rule("Convolution", "ConvolutionOverrideable")
def _convolution(node: Any, tangents: Tangents) -> Tensor | None:
    input, weight, bias = tangents
    settings = (
        list(map(signed, node._saved_stride)),
        list(map(signed, node._saved_padding)),
        list(map(signed, node._saved_dilation)),
        node._saved_transposed,
        list(map(signed, node._saved_output_padding)),
        node._saved_groups,
    )
    convolution: Any = torch.ops.aten.convolution.default
    total = None
    if input is not None:
        total = convolution(input, node._saved_weight, None, *settings)
    if weight is not None:
        total = added(total, convolution(node._saved_input, weight, bias, *settings))
        bias = None
    if bias is not None:
        ones = (1, -1, *[1] * (len(shape_of(node)) - 2))
        total = added(total, bias.view(ones).expand(shape_of(node)))
    return total


# Normalisations: the derivative by the input is symmetric but for the gain behind it --------------


@forward_rule("NativeLayerNorm")
def _layer_norm(node: Any, tangents: Tangents) -> list[Tensor | None]:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    shape = list(map(signed, node._saved_normalized_shape))
    input, gain, bias = tangents
    change = None
    if input is not None:
        backward: Any = torch.ops.aten.native_layer_norm_backward.default
        mask = [True, False, False]
        change = backward(input.contiguous(), x, shape, mean, rstd, None, None, mask)[0]
        weight = node._saved_weight
        if weight is not None:
            change = change * weight
    if gain is not None:
        change = added(change, ((x - mean) * rstd).to(gain.dtype) * gain)
    return [_with(change, bias, node), None, None]


@forward_rule("NativeGroupNorm")
def _group_norm(node: Any, tangents: Tangents) -> list[Tensor | None]:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    count, channels, size, groups = (
        int(n) for n in (node._saved_N, node._saved_C, node._saved_HxW, node._saved_group)
    )
    across = (1, -1, *[1] * (x.ndim - 2))
    input, gain, bias = tangents
    change = None
    if input is not None:
        backward: Any = torch.ops.aten.native_group_norm_backward.default
        mask = [True, False, False]
        settings = (count, channels, size, groups, mask)
        change = backward(input.contiguous(), x.contiguous(), mean, rstd, None, *settings)[0]
        weight = node._saved_weight
        if weight is not None:
            change = change * weight.view(across)
    if gain is not None:
        grouped = x.reshape(count, groups, -1)
        normal = ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).view(x.shape)
        change = added(change, normal.to(gain.dtype) * gain.view(across))
    return [_with(change, None if bias is None else bias.view(across), node), None, None]


@forward_rule("NativeBatchNorm")
def _batch_norm(node: Any, tangents: Tangents) -> list[Tensor | None] | None:
    x, outputs = node._saved_input, len(node._input_metadata)
    statistics = (
        node._saved_running_mean,
        node._saved_running_var,
        node._saved_result1,
        node._saved_result2,
    )
    across = (1, -1, *[1] * (x.ndim - 2))
    input, gain, bias = tangents
    change = None
    if input is not None:  # the gain is the same for all that a statistic is taken of
        backward: Any = torch.ops.aten.native_batch_norm_backward.default
        change = backward(
            input,
            x,
            node._saved_weight,
            *statistics,
            node._saved_training,
            node._saved_eps,
            [True, False, False],
        )[0]
    if gain is not None:
        running_mean, running_variance, mean, rstd = statistics
        if not node._saved_training:
            mean, rstd = running_mean, (running_variance + node._saved_eps).rsqrt()
        scale = gain * rstd
        shift = -mean * scale if bias is None else bias - mean * scale
        part = torch.addcmul(shift.view(across), x, scale.view(across))
        return [added(change, part), *[None] * (outputs - 1)]
    return [
        _with(change, None if bias is None else bias.view(across), node),
        *[None] * (outputs - 1),
    ]


def _with(change: Tensor | None, bias: Tensor | None, node: Any) -> Tensor | None:
    total = added(change, bias)
    return None if total is None else total.expand(shape_of(node))


# Tables -------------------------------------------------------------------------------------------


@forward_rule("Embedding")
def _embedding(node: Any, tangents: Tangents) -> Tensor | None:
    (table,) = tangents
    if node._saved_scale_grad_by_freq:
        return None
    indices, padding = node._saved_indices, signed(node._saved_padding_idx)
    rows = torch.nn.functional.embedding(indices, table)
    return rows if padding < 0 else rows.masked_fill((indices == padding).unsqueeze(-1), 0.0)


# What is only moved -------------------------------------------------------------------------------


@forward_rule(
    "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias", "Clone", "Detach"
)
def _reshaped(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].reshape(shape_of(node))


@forward_rule("Expand")
def _expanded(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].expand(shape_of(node))


@forward_rule("ToCopy")
def _converted(node: Any, tangents: Tangents) -> Tensor:
    metadata = node._input_metadata[0]
    return tangents[0].to(metadata.device, metadata.dtype)


@forward_rule("T")
def _matrix_transposed(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].t()


@forward_rule("Transpose")
def _transposed(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].transpose(signed(node._saved_dim0), signed(node._saved_dim1))


@forward_rule("Permute")
def _permuted(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].permute([signed(d) for d in node._saved_dims])


@forward_rule("Select")
def _selected(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].select(signed(node._saved_dim), signed(node._saved_index))


@forward_rule("Slice")
def _sliced(node: Any, tangents: Tangents) -> Tensor:
    (t,) = tangents
    dim, step = signed(node._saved_dim), node._saved_step
    start = 0 if node._saved_start is None else signed(node._saved_start)
    if start < 0:
        start += t.shape[dim]
    length = shape_of(node)[dim]
    return t.narrow(dim, start, t.shape[dim] - start)[(slice(None),) * (dim % t.ndim)][
        (*[slice(None)] * (dim % t.ndim), slice(0, (length - 1) * step + 1 if length else 0, step))
    ]


@forward_rule("Split", "UnsafeSplit")
def _split(node: Any, tangents: Tangents) -> list[Tensor | None]:
    return list(tangents[0].split(int(node._saved_split_size), signed(node._saved_dim)))


@forward_rule("SplitWithSizes", "UnsafeSplitWithSizes")
def _split_with_sizes(node: Any, tangents: Tangents) -> list[Tensor | None]:
    return list(tangents[0].split(list(node._saved_split_sizes), signed(node._saved_dim)))


@forward_rule("Unbind")
def _unbound(node: Any, tangents: Tangents) -> list[Tensor | None]:
    return list(tangents[0].unbind(signed(node._saved_dim)))


@forward_rule("Cat")
def _joined(node: Any, tangents: Tangents) -> Tensor | None:
    present = next(t for t in tangents if t is not None)
    parts = []
    for number, tangent in enumerate(tangents):
        if tangent is None:
            metadata = read_by(node, number)
            if metadata is None:
                return None
            tangent = present.new_zeros(tuple(metadata.shape))
        parts.append(tangent)
    return torch.cat(parts, signed(node._saved_dim))


@forward_rule("Stack")
def _stacked(node: Any, tangents: Tangents) -> Tensor:
    zero = torch.zeros_like(next(t for t in tangents if t is not None))
    return torch.stack([zero if t is None else t for t in tangents], signed(node._saved_dim))


@forward_rule("Index")
def _indexed(node: Any, tangents: Tangents) -> Tensor:
    (t,) = tangents[:1]
    return torch.ops.aten.index.Tensor(t, list(node._saved_indices))  # type: ignore[no-any-return]


@forward_rule("IndexSelect")
def _index_selected(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].index_select(signed(node._saved_dim), node._saved_index)


@forward_rule("Gather")
def _gathered(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].gather(signed(node._saved_dim), node._saved_index)


@forward_rule("ConstantPadNd")
def _padded(node: Any, tangents: Tangents) -> Tensor:
    return torch.nn.functional.pad(tangents[0], [signed(n) for n in node._saved_pad])


@forward_rule("Tril")
def _lower(node: Any, tangents: Tangents) -> Tensor:
    return tangents[0].tril(signed(node._saved_diagonal))


# Sums and maxima ----------------------------------------------------------------------------------


@forward_rule("Sum")
def _total(node: Any, tangents: Tangents) -> Tensor:
    dims = [signed(d) for d in getattr(node, "_saved_dim", None) or ()]
    return tangents[0].sum(dims or None, keepdim=getattr(node, "_saved_keepdim", False))


@forward_rule("Mean")
def _average(node: Any, tangents: Tangents) -> Tensor:
    dims = [signed(d) for d in getattr(node, "_saved_dim", None) or ()]
    return tangents[0].mean(dims or None, keepdim=getattr(node, "_saved_keepdim", False))


@forward_rule("MaxPool2DWithIndices")
def _largest_in_windows(node: Any, tangents: Tangents) -> list[Tensor | None]:
    (t,), where = tangents, node._saved_result1
    return [t.flatten(-2).gather(-1, where.flatten(-2)).view(where.shape), None]
