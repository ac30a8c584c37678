"""Changes through what only moves, picks, joins or adds up numbers: the same is done to them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irw_optim.gradients.forward._registry import Tangents, forward_rule, of_one_input
from irw_optim.gradients.nodes import read_by, shape_of, signed


@of_one_input(
    "Alias", "Clone", "Detach", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"
)
def _reshaped(node: Any, change: Tensor) -> Tensor:
    return change.reshape(shape_of(node))


@of_one_input("Expand", "LiftFresh", "ToCopy")
def _as_it_is(node: Any, change: Tensor) -> Tensor:
    return change.to(node._input_metadata[0].device)


@of_one_input("T")
def _matrix_transposed(node: Any, change: Tensor) -> Tensor:
    return change.t()


@of_one_input("Transpose")
def _transposed(node: Any, change: Tensor) -> Tensor:
    return change.transpose(signed(node._saved_dim0), signed(node._saved_dim1))


@of_one_input("Permute")
def _permuted(node: Any, change: Tensor) -> Tensor:
    return change.permute([signed(d) for d in node._saved_dims])


@of_one_input("Select")
def _selected(node: Any, change: Tensor) -> Tensor:
    return change.select(signed(node._saved_dim), signed(node._saved_index))


@of_one_input("Slice")
def _sliced(node: Any, change: Tensor) -> Tensor:
    start, end = (None if n is None else signed(n) for n in (node._saved_start, node._saved_end))
    slice_: Any = torch.ops.aten.slice.Tensor
    found: Tensor = slice_(change, signed(node._saved_dim), start, end, signed(node._saved_step))
    return found


@of_one_input("Split", "UnsafeSplit")
def _split(node: Any, change: Tensor) -> list[Tensor | None]:
    return list(change.split(int(node._saved_split_size), signed(node._saved_dim)))


@of_one_input("SplitWithSizes", "UnsafeSplitWithSizes")
def _split_with_sizes(node: Any, change: Tensor) -> list[Tensor | None]:
    sizes = [int(n) for n in node._saved_split_sizes]
    return list(change.split(sizes, signed(node._saved_dim)))


@of_one_input("Unbind")
def _unbound(node: Any, change: Tensor) -> list[Tensor | None]:
    return list(change.unbind(signed(node._saved_dim)))


@forward_rule("Cat")
def _joined(node: Any, tangents: Tangents) -> Tensor | None:
    present = next(t for t in tangents if t is not None)
    parts = []
    for number, tangent in enumerate(tangents):
        if tangent is None:
            metadata = read_by(node, number)
            if metadata is None:
                return None  # of a shape that nothing tells
            tangent = present.new_zeros(tuple(metadata.shape))
        parts.append(tangent)
    return torch.cat(parts, signed(node._saved_dim))


@forward_rule("Stack")
def _stacked(node: Any, tangents: Tangents) -> Tensor:
    zero = torch.zeros_like(next(t for t in tangents if t is not None))
    return torch.stack([zero if t is None else t for t in tangents], signed(node._saved_dim))


@of_one_input("Index")
def _indexed(node: Any, change: Tensor) -> Tensor:
    index: Any = torch.ops.aten.index.Tensor
    found: Tensor = index(change, list(node._saved_indices))
    return found


@of_one_input("IndexSelect")
def _index_selected(node: Any, change: Tensor) -> Tensor:
    return change.index_select(signed(node._saved_dim), node._saved_index)


@of_one_input("Gather")
def _gathered(node: Any, change: Tensor) -> Tensor:
    return change.gather(signed(node._saved_dim), node._saved_index)


@of_one_input("ConstantPadNd")
def _padded(node: Any, change: Tensor) -> Tensor:
    return F.pad(change, [signed(n) for n in node._saved_pad])


@of_one_input("Tril")
def _lower(node: Any, change: Tensor) -> Tensor:
    return change.tril(signed(node._saved_diagonal))


@of_one_input("Triu")
def _upper(node: Any, change: Tensor) -> Tensor:
    return change.triu(signed(node._saved_diagonal))


@of_one_input("Sum")
def _total(node: Any, change: Tensor) -> Tensor:
    return change.sum(_dims(node), keepdim=getattr(node, "_saved_keepdim", False))


@of_one_input("Mean")
def _average(node: Any, change: Tensor) -> Tensor:
    return change.mean(_dims(node), keepdim=getattr(node, "_saved_keepdim", False))


def _dims(node: Any) -> list[int] | None:
    return [signed(d) for d in getattr(node, "_saved_dim", None) or ()] or None


@of_one_input("MaxPool2DWithIndices")
def _largest_in_windows(node: Any, change: Tensor) -> Tensor:
    where = node._saved_result1
    return change.flatten(-2).gather(-1, where.flatten(-2)).view(where.shape)
