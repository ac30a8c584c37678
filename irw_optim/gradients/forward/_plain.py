"""Changes through what moves, picks, joins or adds up numbers, and functions of numbers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.nodes import base_name, pull, read_by, saved, shape_of, slopes_of

from ._tangents import ForwardRule, Tangents, again, of_one


def diagonal(node: Any, tangents: Tangents) -> Tensor | None:
    """Each number of the output depends on one of each input: the node's pull is its push."""
    changing = [(number, t) for number, t in enumerate(tangents) if t is not None]
    ((number, tangent), *more), (output, *others) = changing, node._input_metadata
    if more or read_by(node, number).shape != output.shape:
        return None  # it would take a pull each; a broadcast input may get a sum
    if tangent.dtype != output.dtype:
        tangent = tangent.to(output.dtype)
    return pull(node, [tangent, *[None] * len(others)])[number]


def by_pull(node: Any, tangents: Tangents) -> Tensor:
    """`diagonal`, of one shape and type."""
    found: Tensor = node(*tangents)
    return found


def reshaped(shape: torch.Size) -> ForwardRule:
    """The same numbers."""
    return of_one(lambda node, t: t.reshape(shape))


def of_single_losses(node: Any, tangents: Tangents) -> Tensor | None:
    """Elementwise, unless the losses are averaged."""
    return None if node._saved_reduction else diagonal(node, tangents)


def _reduced(node: Any, change: Tensor) -> Any:
    """Over remembered dimensions, or all."""
    dims = saved(node, "dim") if hasattr(node, "_saved_dim") else None
    kept = getattr(node, "_saved_keepdim", False)
    return getattr(change, base_name(node).lower())(dims or None, keepdim=kept)


def _joined(node: Any, tangents: Tangents) -> Tensor | None:
    """Neighbours without a gradient are one block, whose shape is what is left."""
    present = next(t for t in tangents if t is not None)
    dim, shape = saved(node, "dim"), list(shape_of(node))
    parts: list[Tensor | None] = []
    for number, tangent in enumerate(tangents):
        metadata = read_by(node, number)
        if tangent is None and metadata is not None:
            tangent = present.new_zeros(tuple(metadata.shape))
        if tangent is not None or not parts or parts[-1] is not None:
            parts.append(tangent)
    known = [part for part in parts if part is not None]
    if len(parts) - len(known) > 1:
        return None
    shape[dim] -= sum(part.shape[dim] for part in known)
    return torch.cat([present.new_zeros(shape) if p is None else p for p in parts], dim)


def _stacked(node: Any, tangents: Tangents) -> Tensor:
    zero = torch.zeros_like(next(t for t in tangents if t is not None))
    return torch.stack([zero if t is None else t for t in tangents], saved(node, "dim"))


def _put(node: Any, tangents: Tangents) -> Any:
    """As autograd has it: several numbers for one place add up."""
    (into, put), name = _two(tangents), base_name(node)
    total = put.new_zeros(shape_of(node)) if into is None else into.clone()  # type: ignore[union-attr]
    if name == "IndexPut":
        write, indices = torch.ops.aten.index_put_.default, list(node._saved_indices)
        if not node._saved_accumulate:
            write(total, indices, total.new_zeros(()))
        return total if put is None else write(total, indices, put, True)
    where = saved(node, "dim"), node._saved_index
    if name == "Scatter":
        total.scatter_(*where, 0.0)
    if put is None:
        return total
    if name == "IndexAdd":
        return total.index_add_(*where, put, alpha=node._saved_alpha)
    return total.scatter_add_(*where, put)


def _indexed(node: Any, change: Tensor) -> Tensor:
    indices = node._saved_indices
    (dim, index), *more = [(d, i) for d, i in enumerate(indices) if i is not None]
    if more or index.ndim != 1 or index.dtype != torch.int64 or not index.is_cpu:
        return torch.ops.aten.index.Tensor(change, indices)  # type: ignore[no-any-return]
    return change.index_select(dim, index % change.shape[dim])  # several times as quick


def _found_by_size(node: Any, change: Tensor) -> Tensor:
    indices, dim = node._saved_indices, saved(node, "dim")
    if getattr(node, "_saved_keepdim", True):
        return change.gather(dim, indices)
    return change.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


def _gated(node: Any, change: Tensor) -> Tensor:
    dim = saved(node, "dim")
    (value, gate), (d_value, d_gate) = (t.chunk(2, dim) for t in (node._saved_self, change))
    opened = gate.sigmoid()
    return torch.addcmul(d_value, value * (1 - opened), d_gate) * opened


def _bent(node: Any, tangents: Tangents) -> Tensor:
    """PReLU."""
    d_input, d_slope = (0.0 if t is None else t for t in tangents)
    values, slope = node._saved_self, node._saved_weight
    return torch.where(values > 0, d_input, slope * d_input + values * d_slope)


def _packed(node: Any, change: Tensor) -> Tensor:
    """Time by time, of the sequences that are as long."""
    sizes = node._saved_result1.to(change.device)
    by_time = change.transpose(0, 1) if node._saved_batch_first else change
    present = torch.arange(by_time.shape[1], device=change.device) < sizes.unsqueeze(1)
    return by_time[: len(sizes)][present]


def _softmax(node: Any, tangents: Tangents) -> Tensor | None:
    """J is symmetric, if it does not widen."""
    widens = read_by(node, 0).dtype != node._input_metadata[0].dtype
    return None if widens else diagonal(node, tangents)


def _log_softmax(node: Any, change: Tensor) -> Tensor:
    result: Tensor = node._saved_result
    change = change.to(result.dtype)
    return change - (result.exp() * change).sum(saved(node, "dim"), keepdim=True)


def _two(tangents: Tangents) -> Tangents:
    """A number on the right has no change."""
    return (*tangents, None)[:2]


def _sum(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = _two(tangents)
    if right is None:
        return left
    alpha: float = getattr(node, "_saved_alpha", 1)
    alpha = -alpha if base_name(node) == "Sub" else alpha
    if left is None:
        return right if alpha == 1 else right * alpha
    return torch.add(left, right, alpha=alpha)


def _product(node: Any, tangents: Tangents) -> Tensor | None:
    left, right = _two(tangents)
    total: Tensor | None = None if left is None else left * node._saved_other
    if right is None:
        return total
    values: Tensor = node._saved_self
    return right * values if total is None else torch.addcmul(total, right, values)


def _quotient(node: Any, tangents: Tangents) -> Tensor | None:
    if getattr(node, "_saved_rounding_mode", None) is not None:
        return None
    left, right = _two(tangents)
    bottom: Tensor = node._saved_other
    if left is not None and right is None:
        return left / bottom
    assert right is not None
    quotient: Tensor = node._saved_self / bottom
    return (-right * quotient if left is None else left - right * quotient) / bottom


def _where(node: Any, tangents: Tangents) -> Tensor:
    left, right = (0.0 if t is None else t for t in _two(tangents))
    if base_name(node) == "MaskedFill":
        return torch.where(node._saved_mask, right, left)
    return torch.where(node._saved_condition, left, right)


def _larger(node: Any, tangents: Tangents) -> Tensor:
    """Or the smaller; of two alike a half each, as autograd has it."""
    left, right = (0.0 if t is None else t for t in tangents)
    values, others = node._saved_self, node._saved_other
    won = values > others if base_name(node) == "Maximum" else values < others
    share = torch.where(values == others, 0.5, won.to(values.dtype))
    return torch.add(share * left, (1 - share) * right)


def _negative_likelihood(node: Any, change: Tensor) -> Tensor | None:
    """Linear in the log-probabilities."""
    if node._saved_reduction or change.ndim < 2:
        return None
    aten, weight = torch.ops.aten, node._saved_weight
    forward = aten.nll_loss2d_forward if change.ndim > 2 else aten.nll_loss_forward
    weight = None if weight is None else weight.to(change.dtype)
    found: Tensor = forward(change, node._saved_target, weight, 0, saved(node, "ignore_index"))[0]
    return found


def _of_separate_samples(node: Any, change: Tensor) -> Tensor:
    """One pull has the gradients of all losses."""
    slopes = slopes_of(node)[0]
    assert slopes is not None
    batch_dim = 1 if node.name().startswith("Ctc") else 0
    return (slopes * change).movedim(batch_dim, 0).reshape(*shape_of(node), -1).sum(-1)


def _spread(node: Any, change: Tensor) -> Tangents:
    """Where nothing varies, there is a slope, but no derivative of it."""
    slopes, *_ = slopes_of(node)
    settings = saved(node, "dim") or None, saved(node, "keepdim")
    if slopes is None:
        return [None]
    spread = (slopes * change).sum(*settings)
    return [spread, change.mean(*settings)] if len(node._input_metadata) > 1 else [spread]


RESHAPED = "Alias", "Clone", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"

RULES: dict[str, ForwardRule] = {
    "Expand LiftFresh ToCopy": of_one(lambda node, t: t.to(node._input_metadata[0].device)),
    "T": again(torch.t),
    "Transpose": again(torch.transpose, "dim0", "dim1"),
    "Permute": again(torch.permute, "dims"),
    "Select": again(torch.select, "dim", "index"),
    "Slice": again(torch.ops.aten.slice.Tensor, "dim", "start", "end", "step"),
    "Split UnsafeSplit": again(Tensor.split, "split_size", "dim"),
    "SplitWithSizes UnsafeSplitWithSizes": again(Tensor.split, "split_sizes", "dim"),
    "Unbind": again(Tensor.unbind, "dim"),
    "Cat": _joined,
    "Stack": _stacked,
    "Index": of_one(_indexed),
    "IndexSelect": again(torch.index_select, "dim", "index"),
    "Gather": again(torch.gather, "dim", "index"),
    "IndexAdd IndexPut Scatter ScatterAdd": _put,
    "Kthvalue Max Median Min Mode Sort Topk": of_one(_found_by_size),
    "Cumsum": again(torch.cumsum, "dim"),
    "Flip": again(torch.flip, "dims"),
    "Roll": again(torch.roll, "shifts", "dims"),
    "Repeat": again(Tensor.repeat, "repeats"),
    "Unfold": again(Tensor.unfold, "dimension", "size", "step"),
    "ConstantPadNd": again(F.pad, "pad"),
    "Tril": again(torch.tril, "diagonal"),
    "Triu": again(torch.triu, "diagonal"),
    "Mean Sum": of_one(_reduced),
    "LinalgVectorNorm Std StdMean Var VarMean": of_one(_spread),
    "Glu": of_one(_gated),
    "PackPaddedSequence": of_one(_packed),
    "PreluKernel": _bent,
    "Softmax SafeSoftmax": _softmax,
    "LogSoftmax": of_one(_log_softmax),
    "Add Sub": _sum,
    "Mul": _product,
    "Div": _quotient,
    "MaskedFill Where": _where,
    "Fill torch::autograd::CopyBackwards": lambda node, tangents: _two(tangents)[1],
    "MaskedSelect": again(torch.masked_select, "mask"),
    "Maximum Minimum": _larger,
    "NllLoss NllLoss2D": of_one(_negative_likelihood),
    "CtcLoss MultiMarginLoss MultilabelMarginLoss": of_one(_of_separate_samples),
}
